"""Laws of the adaptive solver: its error follows its tolerance, and a sample's steps are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import ideal_network, mixture_denoiser, refused
from trajectories import exact_states

import diffusion
from diffusion import Guidance, adaptive, schedules, solvers, timesteps
from diffusion.adaptive import Adaptive
from diffusion.adaptive import adaptive as solver_of

LINEAR, EDM, FLOW = schedules.linear(), schedules.edm(), schedules.rectified_flow()
KEY, SHAPE = jax.random.key(5), (2, 2, 1)
NETWORKS = {
    name: ideal_network(schedule, lambda x, a, n: mixture_denoiser(x, a, n, jnp))
    for name, schedule in (("linear", LINEAR), ("edm", EDM), ("flow", FLOW))
}
"""The same objects at every call, which compile once."""


def drawn(solver, name="linear", ids=(0, 1, 2), **options):
    options = {"prediction": "x0", "return_trajectory": True, "sample_ids": np.array(ids), **options}
    return diffusion.sample(NETWORKS[name], None, solver, KEY, len(ids), SHAPE, **options)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    ("name", "schedule", "start"), [("linear", LINEAR, 1000), ("edm", EDM, 1000), ("flow", FLOW, 990)], ids=NETWORKS
)
def test_the_error_follows_the_tolerance(float64, name, schedule, start, order):
    """Against the exact flow, up to the estimate at its end; and more calls are made for less error."""
    x_init = np.linspace(-2.2, 2.4, 8).reshape(2, *SHAPE) * np.hypot(*schedule.at(float(start)))
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        solver = solver_of(schedule, [start, 0], order, rtol=tolerance, atol=tolerance, max_calls=20_000)
        found, count = drawn(solver, name, (0, 1), x_init=jnp.asarray(x_init))
        states = exact_states(schedule, np.array([start, solver.end]), x_init.ravel())
        wanted = mixture_denoiser(states[-1], *schedule.at(solver.end))
        errors.append(np.abs(np.ravel(found) - wanted).max())
        calls.append(int(count.max()))
    assert errors[0] < 0.2
    assert errors[2] < errors[1] / 5 < errors[0] / 25
    assert errors[2] < 1e-4
    assert calls[0] < calls[1] < calls[2]


def test_a_sample_takes_its_own_steps_whatever_is_around_it():
    solver = solver_of(LINEAR, [1000, 0])
    images, calls = drawn(solver, ids=range(8))
    some, their_calls = drawn(solver, ids=(6, 2))
    assert len(set(calls.tolist())) > 1
    np.testing.assert_array_equal(their_calls, calls[np.array([6, 2])])
    np.testing.assert_allclose(some, images[np.array([6, 2])], rtol=0, atol=1e-5)


def test_samples_begin_with_the_noise_of_their_key_and_number():
    """So that they are those of a table in many steps, from the same noise."""
    images, _ = drawn(solver_of(LINEAR, [1000, 0], rtol=1e-3, atol=1e-4))
    table = solvers.dpm_solver_pp(LINEAR, timesteps.log_snr(LINEAR, 300), 3)
    wanted = drawn(table, return_trajectory=False)
    np.testing.assert_allclose(images, wanted, rtol=0, atol=5e-3)


def test_another_tolerance_and_start_compile_nothing():
    before = adaptive._solve._cache_size()
    for number, solver in enumerate((solver_of(LINEAR, [900, 0], 2), solver_of(LINEAR, [800, 0], 2, 0.01, 0.001))):
        drawn(solver)
        assert adaptive._solve._cache_size() <= before + 1, number


def test_guidance_clip_and_known_pixels_go_into_every_estimate(float64):
    """As they do in a table: compared with one of many steps."""

    def network(params, x, t, cond):
        return 0.3 * x + 0.2 * cond[:, None, None, None]

    cond = jnp.array([1.0, -1.0])
    options = {
        "prediction": "x0",
        "clip": "recompute",
        "cond": cond,
        "guidance": Guidance(scale=3.0, null=0 * cond, interval=(300, 1000)),
        "known": (0.5 * jnp.ones(SHAPE), jnp.asarray([[[1.0], [0.0]], [[0.0], [0.0]]])),
    }
    found, table = (
        diffusion.sample(network, None, solver, KEY, 2, SHAPE, **options)
        for solver in (
            solver_of(LINEAR, [1000, 0], rtol=1e-4, atol=1e-4),
            solvers.heun(LINEAR, timesteps.log_snr(LINEAR, 400)),
        )
    )
    np.testing.assert_allclose(found, table, rtol=0, atol=5e-3)
    np.testing.assert_array_equal(found[:, 0, 0, 0], 0.5)


def test_a_sample_that_is_not_done_in_time_is_no_number():
    images, calls = drawn(solver_of(LINEAR, [1000, 0], rtol=1e-5, atol=1e-6, max_calls=20))
    assert np.isnan(images).all()
    assert np.all(calls <= 20)


def test_what_an_adaptive_solver_cannot_do_is_refused():
    solver = solver_of(LINEAR, [1000, 0])
    assert isinstance(solver, Adaptive)
    assert "adaptive(order=3" in str(solver)
    for name, options in (
        ("cache is for tables", {"cache": "any"}),
        ("noise is for tables", {"noise": diffusion.Brownian(1000)}),
        ("callback is for tables", {"callback": print}),
        ("rule cfg and one scale", {"guidance": Guidance(lambda t: t, null=jnp.zeros(3)), "cond": jnp.zeros(3)}),
    ):
        with refused(name):
            drawn(solver, **options)
    with refused("mean_flow goes from one time"):
        drawn(solver_of(FLOW, [900, 0]), "flow", prediction="mean_flow")
    for pattern, options in (
        ("order is 4", {"order": 4}),
        ("rtol is -1", {"rtol": -1}),
        ("one of them above 0", {"rtol": 0, "atol": 0}),
        ("h_init is 0", {"h_init": 0}),
        ("end is 1", {"end": 1}),
        ("max_calls is 3", {"max_calls": 3}),
    ):
        with refused(pattern):
            solver_of(LINEAR, [1000, 0], **options)
    with refused("signal is zero"):
        solver_of(FLOW, [1000, 0])
    with refused("some signal at T"):
        solver_of(schedules.zero_terminal_snr(LINEAR), [900, 0])
