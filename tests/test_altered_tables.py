"""Laws of what changes a whole table: the analytic first step, and Langevin correctors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import mixture_denoiser, refused

import diffusion
from diffusion import schedules, solvers, timesteps
from diffusion.solvers import SOLVERS, analytic_first, ddim, from_json, gaussian_moments, langevin, make_table, unipc
from diffusion.solvers.history import from_table

LINEAR, EDM, FLOW = schedules.linear(), schedules.edm(), schedules.rectified_flow()
DETERMINISTIC = [
    name
    for name, solver in SOLVERS.items()
    if name != "restart" and not np.any(solver(LINEAR, timesteps.uniform(LINEAR, 6)).update[0, :, -1])
]


def run(table, x, first_slope=None):
    """A plain loop of a deterministic table; the first estimate is a multiple of x where that is given."""
    registers = np.zeros((table.num_registers, x.size))
    registers[0] = x
    if table.start is not None:
        registers[:] = np.outer(table.start, x)
    for i in range(table.nfe):
        x0 = mixture_denoiser(registers[0], table.signal[i], table.noise[i])
        if i == 0 and first_slope is not None:
            x0 = first_slope * registers[0]
        registers = np.tensordot(table.update[i], np.stack([*registers, x0, 0 * x0]), axes=1)
    return registers[0]


# The analytic first step


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("estimate", ["direction", "score"])
def test_an_analytic_first_step_is_the_table_with_another_first_estimate_and_a_call_less(name, estimate):
    table = SOLVERS[name](LINEAR, timesteps.uniform(LINEAR, 6))
    changed = analytic_first(table, estimate)
    a, n = LINEAR.at(1000.0)
    # diff-sampler's d = x / sqrt(1 + sigma^2) in units of the signal is eps = x; the score of N(0, I) is -x = -eps / n.
    eps = 1.0 if estimate == "direction" else n
    noise = np.linspace(-2, 2, 7)
    assert changed.nfe == table.nfe - 1
    expected = run(table, noise, first_slope=(1 - n * eps) / a)
    np.testing.assert_allclose(run(changed, noise), expected, rtol=0, atol=1e-11)


def test_direction_is_that_of_diff_sampler_where_noise_is_counted_in_signal():
    """x / sqrt(1 + sigma^2) for eps, where x = x_0 + sigma eps: x' = x + (sigma' - sigma) eps."""
    tau = timesteps.karras(EDM, 4)
    sigma, following = EDM.at(tau[:2])[1]
    table = analytic_first(ddim(EDM, tau), "direction")
    x = np.hypot(1, sigma)  # of noise 1
    np.testing.assert_allclose(table.start, [x + (following - sigma) * x / np.hypot(1, sigma)], rtol=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_score_of_noise_is_exact_for_data_that_is_noise(name):
    table = SOLVERS[name](LINEAR, timesteps.uniform(LINEAR, 6))
    expected = gaussian_moments(table, 0.0, 1.0)
    np.testing.assert_allclose(gaussian_moments(analytic_first(table, "score"), 0.0, 1.0), expected, rtol=0, atol=1e-12)


def test_the_first_step_can_be_analytic_where_there_is_no_signal():
    table = analytic_first(unipc(FLOW, timesteps.uniform(FLOW, 4)), "direction")
    assert np.isfinite(table.start).all()


@pytest.mark.parametrize("clip", ["none", "keep_eps"])
def test_the_scan_begins_with_all_registers_of_an_analytic_first_step(float64, clip):
    """The same as the table of one call more, whose network returns the analytic estimate in the first."""
    a, n = LINEAR.at(1000.0)

    def network(params, x, t, cond=None):
        slope = jnp.where(t[0] > 999, a / (1 + n), 0.3)
        return slope * x

    table, key = solvers.deis(LINEAR, timesteps.uniform(LINEAR, 5), order=3), jax.random.key(0)
    drawn = [
        diffusion.sample(network, None, t, key, 3, (2, 2, 1), prediction="x0", clip=clip)
        for t in (table, analytic_first(table, "direction"))
    ]
    np.testing.assert_allclose(*drawn, rtol=0, atol=1e-12)


def test_json_keeps_where_registers_begin_and_says_nothing_of_a_usual_start():
    table = analytic_first(unipc(LINEAR, timesteps.uniform(LINEAR, 5)))
    np.testing.assert_array_equal(from_json(table.to_json()).start, table.start)
    assert "start" not in json.loads(unipc(LINEAR, timesteps.uniform(LINEAR, 5)).to_json())


def test_what_cannot_have_an_analytic_first_step_is_refused():
    tau = timesteps.uniform(LINEAR, 5)
    with refused("draws noise in its first step"):
        analytic_first(ddim(LINEAR, tau, eta=1))
    with refused("only one network call"):
        analytic_first(ddim(LINEAR, timesteps.uniform(LINEAR, 1)))
    with refused("has one already"):
        analytic_first(analytic_first(ddim(LINEAR, tau)))
    with refused("from images to noise"):
        analytic_first(ddim(LINEAR, tau).reverse())
    with refused("afs is 'scores'.*score"):
        analytic_first(ddim(LINEAR, tau), "scores")
    with refused("cannot be reversed"):
        analytic_first(ddim(LINEAR, tau)).reverse()
    with refused("no history form"):
        from_table(analytic_first(ddim(LINEAR, tau)))
    with refused("start has shape"):
        make_table("mine", [2, 1, 0], [2, 1], [0.5, 0.6], [0.8, 0.7], np.ones((2, 1, 3)), start=[1, 2])


# Langevin correctors


@pytest.mark.parametrize("schedule", [LINEAR, EDM, FLOW], ids=["linear", "edm", "flow"])
@pytest.mark.parametrize("snr", [0.05, 0.4])
def test_langevin_steps_lead_from_anywhere_to_their_stationary_variance(schedule, snr):
    """On N(0, v), x' = (1 - step / v) x + sqrt(2 step) z keeps the variance v / (1 - step / (2 v)) and no other."""
    mean, variance, count = 0.4, 0.3, 20_000
    t = schedule.num_timesteps / 2
    a, n = schedule.at(t)
    table = langevin(ddim(schedule, np.array([t, 0.0])), snr, count)
    # The last step of DDIM returns D itself, and D says what x was.
    slope = a * variance / (a**2 * variance + n**2)
    v = a**2 * variance + n**2
    step = 2 * snr**2 * n**2
    found_mean, found = gaussian_moments(table, mean, variance, start=(3.0, 7.0))
    assert found_mean == pytest.approx(mean, abs=1e-10)
    assert found == pytest.approx(slope**2 * v / (1 - step / (2 * v)), rel=1e-10)


def test_a_langevin_step_is_the_papers_where_the_norms_are_what_they_are_expected_to_be():
    """Algorithm 4 of arXiv:2011.13456: step = 2 (snr |z| / |score|)^2."""
    rng, snr = np.random.default_rng(0), 0.16
    table = langevin(ddim(LINEAR, timesteps.uniform(LINEAR, 3)), snr)
    x, eps, z = rng.standard_normal((3, 100))
    eps *= np.linalg.norm(z) / np.linalg.norm(eps)
    for stage in (0, 2, 4):
        a, n = table.signal[stage], table.noise[stage]
        score = -eps / n
        step = 2 * (snr * np.linalg.norm(z) / np.linalg.norm(score)) ** 2
        found = table.update[stage, 0] @ np.stack([x, (x - n * eps) / a, z])
        np.testing.assert_allclose(found, x + step * score + np.sqrt(2 * step) * z, rtol=0, atol=1e-12)


def test_correctors_bring_a_sampler_of_few_steps_nearer_to_the_data():
    """DDIM in 25 steps loses variance; the steps between bring x back to what is known at each level."""
    table = ddim(LINEAR, timesteps.uniform(LINEAR, 25))
    corrected = [table, langevin(table, 0.16, 1), langevin(table, 0.16, 5)]
    assert [t.nfe for t in corrected] == [25, 50, 150]
    errors = [abs(gaussian_moments(t, 0.0, 0.25)[1] - 0.25) for t in corrected]
    assert errors[2] < errors[1] < errors[0]


def test_an_analytic_first_step_leaves_out_the_correctors_of_its_level():
    table = langevin(analytic_first(ddim(LINEAR, timesteps.uniform(LINEAR, 5))), steps=2)
    assert table.nfe == 4 * 3
    assert table.start_std == analytic_first(ddim(LINEAR, timesteps.uniform(LINEAR, 5))).start_std


def test_what_cannot_have_a_corrector_is_refused():
    tau = timesteps.uniform(LINEAR, 5)
    for snr in (0.0, -1.0, 1.5, float("nan")):
        with refused("snr is"):
            langevin(ddim(LINEAR, tau), snr)
    with refused("steps is 0"):
        langevin(ddim(LINEAR, tau), steps=0)
    for build in (langevin, solvers.resampled):
        with refused("has 5,000,000,0.* network calls; give fewer, up to 1,000,000"):
            build(ddim(LINEAR, tau), **{"steps" if build is langevin else "repeats": 10**9})
    for table in (unipc(LINEAR, tau), solvers.ddpm(LINEAR, tau, "learned"), ddim(LINEAR, tau).reverse()):
        with refused("cannot have a Langevin corrector"):
            langevin(table)
