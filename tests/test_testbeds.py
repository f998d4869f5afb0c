"""Laws of the exact denoisers and of the exact probability flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import MEANS, VARIANCES, WEIGHTS, gaussian_denoiser, mixture_denoiser, refused
from trajectories import exact_states

import diffusion
from diffusion import schedules, solvers, testbeds, timesteps
from diffusion.predictions import reading

T = 1000
LINEAR = schedules.linear()
SCHEDULES = {
    "linear": LINEAR,
    "cosine": schedules.cosine(),
    "rectified_flow": schedules.rectified_flow(),
    "edm": schedules.edm(),
    "zero_snr": schedules.zero_terminal_snr(LINEAR),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
TIMES = (0.25, 1.0, 17.5, 400.0, 999.5)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, 3, 2, 1)).astype(np.uint8)
FLOATS = IMAGES / 127.5 - 1
SHAPE = IMAGES.shape[1:]


def noisy(schedule, t, count=5, seed=1):
    rng = np.random.default_rng(seed)
    a, n = schedule.at(t)
    return a * FLOATS[:count] + n * rng.standard_normal((count, *SHAPE))


compiled = jax.jit(lambda apply_fn, params, x, t: apply_fn(params, x, t), static_argnums=0)


def call(testbed, x, t):
    return np.asarray(compiled(*testbed, jnp.asarray(x), jnp.full(len(x), t)))


def nearest_weights(schedule, x, t):
    """The posterior over the images, by the definition, in float64."""
    a, n = schedule.at(t)
    distance = np.square(x[:, None] - a * FLOATS[None]).reshape(len(x), len(FLOATS), -1).sum(-1)
    weights = np.exp(-(distance - distance.min(1, keepdims=True)) / (2 * n**2))
    return weights / weights.sum(1, keepdims=True)


@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_gaussian_denoiser_is_the_closed_form(schedule):
    mean, variance = np.linspace(-0.5, 0.5, 6).reshape(SHAPE), np.linspace(0.01, 0.4, 6).reshape(SHAPE)
    testbed = testbeds.gaussian(schedule, mean, variance, "x0")
    for t in TIMES:
        x = noisy(schedule, t)
        wanted = gaussian_denoiser(x, *schedule.at(t), mean, variance)
        np.testing.assert_allclose(call(testbed, x, t), wanted, rtol=1e-9, atol=1e-12)


@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_mixture_of_one_pixel_is_the_closed_form(schedule):
    testbed = testbeds.mixture(schedule, WEIGHTS, np.reshape(MEANS, (3, 1)), VARIANCES, "x0")
    for t in TIMES:
        x = np.linspace(-2, 2, 9)[:, None]
        wanted = mixture_denoiser(x, *schedule.at(t))
        np.testing.assert_allclose(call(testbed, x, t), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_mixture_of_equal_gaussians_is_one_gaussian_and_weights_need_not_be_normalized():
    mean, variance = FLOATS[:1], np.linspace(0.01, 0.4, 6).reshape(SHAPE)
    testbed = testbeds.mixture(LINEAR, [1, 5], np.repeat(mean, 2, 0), np.stack([variance] * 2), "v")
    alone = testbeds.gaussian(LINEAR, mean[0], variance, "v")
    x = noisy(LINEAR, 300.0)
    np.testing.assert_allclose(call(testbed, x, 300.0), call(alone, x, 300.0), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.usefixtures("float64")
def test_the_ideal_denoiser_is_the_posterior_mean_of_the_images_in_blocks_of_any_size(name, block):
    schedule = SCHEDULES[name]
    for images in (IMAGES, FLOATS):
        testbed = testbeds.ideal(schedule, images, "x0", block=block)
        for t in TIMES:
            x = noisy(schedule, t)
            wanted = np.tensordot(nearest_weights(schedule, x, t), FLOATS, axes=1)
            np.testing.assert_allclose(call(testbed, x, t), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("float64")
def test_narrow_gaussians_around_images_tend_to_the_ideal_denoiser():
    narrow = testbeds.mixture(LINEAR, np.ones(37), FLOATS, np.full(37, 1e-9), "x0")
    x = noisy(LINEAR, 500.0)
    np.testing.assert_allclose(call(narrow, x, 500.0), call(testbeds.ideal(LINEAR, IMAGES, "x0"), x, 500.0), atol=1e-7)


@every_schedule
@pytest.mark.usefixtures("float64")
def test_a_bandwidth_makes_the_set_a_mixture_of_gaussians(schedule):
    for prediction in ("x0", "eps"):
        wanted = testbeds.mixture(schedule, np.ones(37), FLOATS, np.full(37, 0.1**2), prediction)
        got = testbeds.ideal(schedule, IMAGES, prediction, bandwidth=0.1, block=10)
        for t in (0.0, *TIMES):
            x = noisy(schedule, t)
            np.testing.assert_allclose(call(got, x, t), call(wanted, x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.usefixtures("float64")
def test_every_prediction_reads_as_the_same_estimate(name, prediction):
    schedule = SCHEDULES[name]
    makers = {
        "gaussian": lambda p: testbeds.gaussian(schedule, 0.1, 0.2, p),
        "mixture": lambda p: testbeds.mixture(schedule, [1, 2], FLOATS[:2], [0.1, 0.3], p),
        "ideal": lambda p: testbeds.ideal(schedule, IMAGES, p),
        "other": lambda p: testbeds.from_denoiser(schedule, lambda x, a, n: jnp.tanh(x), p),
    }
    for make in makers.values():
        testbed, wanted = make(prediction), make("x0")
        for t in TIMES:
            x, (a, n) = noisy(schedule, t), schedule.at(t)
            r = reading(prediction, np.float64(t), a, n)
            got = r.from_x * x + r.from_output * call(testbed, r.input_scale * x, r.time)
            np.testing.assert_allclose(got, call(wanted, x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_towards_clean_data_all_is_finite_and_the_ideal_estimate_the_nearest_image(precision):
    with jax.enable_x64(precision is np.float64):
        for t in (0.0, 1e-12, 1e-6, 1e-3, 1.0):
            a, n = LINEAR.at(t)
            x = (a * FLOATS + n * np.random.default_rng(3).standard_normal(FLOATS.shape)).astype(precision)
            np.testing.assert_allclose(call(testbeds.ideal(LINEAR, IMAGES, "x0"), x, t), FLOATS, atol=1e-6)
            for prediction in ("eps", "v"):
                assert np.all(np.isfinite(call(testbeds.ideal(LINEAR, IMAGES, prediction), x, t)))
            assert np.all(np.isfinite(call(testbeds.gaussian(LINEAR, 0.0, 0.0), x, t)))
        assert np.all(call(testbeds.gaussian(LINEAR, 0.1, 0.2), x, 0.0) == 0)  # the noise that no noise says of


def test_float32_keeps_the_digits_of_eps_near_clean_data():
    """(x - a D) / n would lose all but one or two of them."""
    testbed = testbeds.gaussian(LINEAR, 0.3, 0.25)
    x, (a, n) = np.float32([[0.9]]), LINEAR.at(0.01)
    wanted = n * (np.float64(x) - a * 0.3) / (a**2 * 0.25 + n**2)
    np.testing.assert_allclose(call(testbed, x, 0.01), wanted, rtol=2e-6)


def test_memory_of_the_ideal_denoiser_does_not_grow_with_the_set():
    def working_memory(count):
        testbed = testbeds.ideal(LINEAR, np.zeros((count, 16, 16, 3), np.uint8), block=64)
        compiled = jax.jit(testbed.apply_fn).lower(testbed.params, jnp.zeros((4, 16, 16, 3)), jnp.ones(4)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert working_memory(6400) <= working_memory(640) + 1024


def test_another_set_or_schedule_of_the_same_shape_compiles_nothing():
    calls = []
    for schedule in (LINEAR, SCHEDULES["cosine"]):
        for images in (IMAGES, IMAGES[::-1]):
            testbed = testbeds.ideal(schedule, images)
            calls.append(testbed.apply_fn)
            table = solvers.ddim(schedule, timesteps.uniform(schedule, 3))
            diffusion.sample(testbed.apply_fn, testbed.params, table, jax.random.key(0), 2, SHAPE)
    assert len(set(calls)) == 1


@pytest.mark.parametrize("name", ["linear", "cosine", "rectified_flow", "edm"])
def test_the_ode_solution_of_gaussian_data_is_the_affine_map(name):
    schedule = SCHEDULES[name]
    top = T if name != "rectified_flow" else 999.0
    mean, variance = np.linspace(-0.5, 0.5, 6).reshape(SHAPE), np.linspace(0.01, 0.4, 6).reshape(SHAPE)
    x = np.hypot(*schedule.at(top)) * np.random.default_rng(2).standard_normal((4, *SHAPE))
    for prediction in ("eps", "x0"):
        testbed = testbeds.gaussian(schedule, mean, variance, prediction)
        for t_end in (0.0, 1.0, 300.5):
            wanted = testbeds.gaussian_flow(schedule, mean, variance, x, top, t_end)
            got = testbeds.ode_solution(*testbed, schedule, x, top, t_end, prediction=prediction, tolerance=1e-10)
            np.testing.assert_allclose(got, wanted, atol=1e-8)


def test_the_affine_map_keeps_marginals_and_inverts():
    mean, variance = 0.3, 0.2
    (a, n), x = LINEAR.at(700.0), np.linspace(-1, 1, 5)[:, None]
    there = testbeds.gaussian_flow(LINEAR, mean, variance, x, 700.0, 20.0)
    np.testing.assert_allclose(testbeds.gaussian_flow(LINEAR, mean, variance, there, 20.0, 700.0), x, atol=1e-13)
    deviations = (x - a * mean) / np.sqrt(a**2 * variance + n**2)
    np.testing.assert_allclose(
        testbeds.gaussian_flow(LINEAR, mean, variance, x, 700.0), mean + variance**0.5 * deviations
    )


def test_the_ode_solution_of_a_mixture_keeps_quantiles():
    """In one dimension the flow is monotone, so the share of the data below x is what it was below the noise."""
    from scipy.stats import norm

    testbed = testbeds.mixture(LINEAR, WEIGHTS, np.reshape(MEANS, (3, 1)), VARIANCES)
    (a, n), x = LINEAR.at(T), np.linspace(-2, 2, 9)
    spread = np.sqrt(a**2 * np.array(VARIANCES) + n**2)
    wanted = norm.cdf((x[:, None] - a * np.array(MEANS)) / spread) @ WEIGHTS
    got = testbeds.ode_solution(*testbed, LINEAR, x[:, None], T, tolerance=1e-10)
    np.testing.assert_allclose(norm.cdf((got - np.array(MEANS)) / np.sqrt(VARIANCES)) @ WEIGHTS, wanted, atol=1e-8)


def test_the_ode_solution_agrees_with_another_integrator_at_inner_times():
    testbed = testbeds.mixture(LINEAR, WEIGHTS, np.reshape(MEANS, (3, 1)), VARIANCES, "v")
    x = np.linspace(-2, 2, 9)
    wanted = exact_states(LINEAR, np.array([900.0, 333.3]), x)[-1]
    got = testbeds.ode_solution(*testbed, LINEAR, x[:, None], 900.0, 333.3, prediction="v", tolerance=1e-11)[:, 0]
    np.testing.assert_allclose(got, wanted, atol=1e-9)


def test_the_flow_of_a_finite_set_ends_at_its_images_and_a_smaller_tolerance_changes_little():
    x = np.random.default_rng(4).standard_normal((6, *SHAPE))
    testbed = testbeds.ideal(LINEAR, IMAGES)
    rough, fine = (testbeds.ode_solution(*testbed, LINEAR, x, T, tolerance=tolerance) for tolerance in (1e-6, 1e-10))
    assert np.abs(fine[:, None] - FLOATS).reshape(6, 37, -1).max(-1).min(-1).max() < 1e-8
    np.testing.assert_allclose(rough, fine, atol=1e-5)
    middle = [testbeds.ode_solution(*testbed, LINEAR, x, T, 600.0, tolerance=tolerance) for tolerance in (1e-8, 1e-11)]
    np.testing.assert_allclose(*middle, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_solvers_converge_to_the_ode_solution_on_images():
    x = np.random.default_rng(4).standard_normal((6, *SHAPE))
    testbed = testbeds.ideal(LINEAR, IMAGES)
    exact = testbeds.ode_solution(*testbed, LINEAR, x, T, 200.0)
    errors = []
    for steps in (40, 80, 160):
        tau = timesteps.explicit(
            LINEAR, np.append(LINEAR.time_of(np.linspace(*LINEAR.half_log_snr([T, 200]), steps)), 0)
        )
        table = solvers.dpm_solver_pp(LINEAR, tau, order=2, lower_order_final=False)
        key = jax.random.key(0)
        _, path = diffusion.sample(*testbed, table, key, 6, SHAPE, x_init=jnp.asarray(x), return_trajectory=True)
        errors.append(np.sqrt(np.mean((path.x[-2] - exact) ** 2)))
    order = -np.polyfit(np.log([40, 80, 160]), np.log(errors), 1)[0]
    assert 1.7 < order < 2.6, (order, errors)


def test_wrong_arguments_are_refused():
    x = np.zeros((1, *SHAPE))
    with refused("prediction is 'epsilon'"):
        testbeds.gaussian(LINEAR, 0, 1, "epsilon")
    with refused("variance"):
        testbeds.gaussian(LINEAR, 0, -1)
    with refused("weights"):
        testbeds.mixture(LINEAR, [1, 0], np.zeros((2, 1)), [1, 1])
    with refused("use `ideal`"):
        testbeds.mixture(LINEAR, [1, 1], np.zeros((2, 1)), [1, 0])
    for images in (IMAGES.astype(int), FLOATS * 127.5, IMAGES[:0]):
        with refused("images have"):
            testbeds.ideal(LINEAR, images)
    with refused("block"):
        testbeds.ideal(LINEAR, IMAGES, block=0)
    testbed = testbeds.gaussian(LINEAR, 0, 1)
    for times in ((10, 10), (10, 20), (1001, 0), (10, -1)):
        with refused("t_start"):
            testbeds.ode_solution(*testbed, LINEAR, x, *times)
    with refused("signal is zero"):
        testbeds.ode_solution(*testbed, SCHEDULES["zero_snr"], x, T)
    with refused("tolerance"):
        testbeds.ode_solution(*testbed, LINEAR, x, T, tolerance=0)
