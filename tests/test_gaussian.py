"""Laws of the Gaussian process: forward noising, conversions, posteriors, DDIM's noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import exact_powers, exact_transition_var

from diffusion import gaussian, schedules

T = 1000
LINEAR_BETAS = np.linspace(1e-4, 0.02, T)
SCALED_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
BETAS = {"linear": LINEAR_BETAS, "scaled_linear": SCALED_BETAS}
LINEAR = schedules.from_betas(LINEAR_BETAS)
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear()),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
both_betas = pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS.keys())
ALL_T, ALL_S = np.tril_indices(T + 1, -1)
PUBLIC = ("q_sample", "predict_x0", "predict_eps", "velocity", "posterior", "ddim_sigma", "split_noise")


def some_pairs():
    """All adjacent pairs, all from T, all to 0 and 1, and random ones."""
    top, rng = np.arange(1, T + 1), np.random.default_rng(0)
    random = np.sort(rng.integers(0, T + 1, (2, 3000)), axis=0)
    s, t = np.concatenate(
        [[top - 1, top], [top - 1, 0 * top + T], [0 * top, top], [0 * top[1:] + 1, top[1:]], random], 1
    )
    return t[s < t], s[s < t]


def images(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def test_q_sample_has_the_moments_of_the_forward_process():
    number = 200_000
    eps = jax.random.normal(jax.random.key(0), (number,))
    alpha_bar, noise_var = exact_powers(LINEAR_BETAS)
    for t in (1, 300, T):
        x_t = np.asarray(gaussian.q_sample(LINEAR, jnp.full(number, 0.7), t, eps), np.float64)
        deviation = noise_var[t] ** 0.5
        assert abs(x_t.mean() - 0.7 * alpha_bar[t] ** 0.5) < 5 * deviation / number**0.5
        assert abs(x_t.var() / noise_var[t] - 1) < 5 * (2 / number) ** 0.5


@both_betas
@pytest.mark.usefixtures("float64")
def test_q_sample_is_signal_plus_noise_at_every_timestep(betas):
    alpha_bar, noise_var = exact_powers(betas)
    x_0, eps = images((T + 1, 2), 1), images((T + 1, 2), 2)
    wanted = np.sqrt(alpha_bar)[:, None] * x_0 + np.sqrt(noise_var)[:, None] * eps
    x_t = gaussian.q_sample(schedules.from_betas(betas), x_0, np.arange(T + 1), eps)
    np.testing.assert_allclose(x_t, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
@every_schedule
def test_conversions_are_inverses(schedule):
    t = np.arange(1, T)
    x_0, eps = images((t.size, 2, 3), 1), images((t.size, 2, 3), 2)
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    np.testing.assert_allclose(gaussian.predict_x0(schedule, x_t, t, eps), x_0, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gaussian.predict_eps(schedule, x_t, t, x_0), eps, rtol=1e-9, atol=1e-9)
    v = gaussian.velocity(schedule, x_0, t, eps)
    signal, noise = (level[:, None, None] for level in schedule.at(t))
    np.testing.assert_allclose(signal * x_t - noise * v, x_0, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(noise * x_t + signal * v, eps, rtol=1e-9, atol=1e-9)


@both_betas
@pytest.mark.usefixtures("float64")
def test_posterior_is_gaussian_conditioning_for_any_step(betas):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add, in x_s."""
    t, s = some_pairs()
    t, s = t[s > 0], s[s > 0]
    alpha_bar, noise_var = exact_powers(betas)
    slope, width = np.sqrt(alpha_bar[t] / alpha_bar[s]), exact_transition_var(betas, t, s)
    variance = 1 / (1 / noise_var[s] + slope**2 / width)
    x_t, x_0 = images(t.shape, 1), images(t.shape, 2)
    mean = variance * (np.sqrt(alpha_bar[s]) * x_0 / noise_var[s] + slope * x_t / width)
    got_mean, got_variance = gaussian.posterior(schedules.from_betas(betas), x_t, x_0, t, s)
    np.testing.assert_allclose(got_variance, variance, rtol=1e-12)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@every_schedule
def test_posterior_at_clean_data_is_x_0_with_no_variance(schedule):
    t = np.arange(1, T + 1)
    x_t, x_0 = images((T, 3), 1), images((T, 3), 2)
    mean, variance = gaussian.posterior(schedule, x_t, x_0, t, np.zeros_like(t))
    np.testing.assert_allclose(mean, x_0, rtol=1e-12)
    np.testing.assert_array_equal(variance, 0)


@both_betas
@pytest.mark.usefixtures("float64")
def test_posterior_of_one_timestep_is_ddpm_with_the_original_betas(betas):
    """DDPM, Eq. 6 and 7."""
    t = np.arange(1, T + 1)
    alpha_bar, noise_var = exact_powers(betas)
    x_t, x_0 = images((T,), 1), images((T,), 2)
    from_x0 = np.sqrt(alpha_bar[t - 1]) * betas / noise_var[t]
    from_xt = np.sqrt(1 - betas) * noise_var[t - 1] / noise_var[t]
    mean, variance = gaussian.posterior(schedules.from_betas(betas), x_t, x_0, t, t - 1)
    np.testing.assert_allclose(mean, from_x0 * x_0 + from_xt * x_t, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(variance, noise_var[t - 1] / noise_var[t] * betas, rtol=1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@every_schedule
def test_split_noise_keeps_unit_variance_for_every_step(schedule, eta):
    kept, fresh = gaussian.split_noise(schedule, ALL_T, ALL_S, eta)
    np.testing.assert_allclose(kept**2 + fresh**2, 1, rtol=0, atol=1e-12)
    assert np.all((np.asarray(kept) >= 0) & (np.asarray(fresh) >= 0))


@both_betas
@pytest.mark.usefixtures("float64")
def test_split_noise_keeps_the_marginal_of_the_posterior(betas):
    """At eta = 1, A is the correlation of x_s and x_t given x_0: A^2 = abar_t n_s^2 / (abar_s n_t^2)."""
    alpha_bar, noise_var = exact_powers(betas)
    t, s = some_pairs()
    correlation = np.sqrt(alpha_bar[t] * noise_var[s] / (alpha_bar[s] * noise_var[t]))
    kept, _ = gaussian.split_noise(schedules.from_betas(betas), t, s, 1.0)
    np.testing.assert_allclose(kept, correlation, rtol=0, atol=1e-12)


@both_betas
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_sigma_is_equation_16(betas, eta):
    t, s = some_pairs()
    _, noise_var = exact_powers(betas)
    wanted = eta * np.sqrt(noise_var[s] / noise_var[t]) * np.sqrt(exact_transition_var(betas, t, s))
    np.testing.assert_allclose(gaussian.ddim_sigma(schedules.from_betas(betas), t, s, eta), wanted, rtol=1e-12)


@every_schedule
def test_ddim_sigma_squared_is_the_posterior_variance_at_eta_one(schedule):
    t, s = some_pairs()
    _, variance = gaussian.posterior(schedule, jnp.zeros(t.shape), jnp.zeros(t.shape), t, s)
    np.testing.assert_allclose(gaussian.ddim_sigma(schedule, t, s, 1.0) ** 2, variance, rtol=1e-6)


@every_schedule
def test_the_variance_of_a_step_in_float32_is_within_4e_5_of_float64(schedule):
    """Stated bound: relative 4e-5 for all adjacent pairs, where 1 - alpha_bar_t / alpha_bar_s would lose 1e-3."""
    t = np.arange(2, T + 1)
    single = np.asarray(gaussian.posterior(schedule, jnp.zeros(t.shape), jnp.zeros(t.shape), t, t - 1)[1], np.float64)
    with jax.enable_x64(True):
        double = gaussian.posterior(schedule, jnp.zeros(t.shape), jnp.zeros(t.shape), t, t - 1)[1]
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=4e-5)


@every_schedule
def test_split_noise_in_float32_is_within_1e_5_of_float64(schedule):
    t, s = some_pairs()
    single = gaussian.split_noise(schedule, t, s, 1.0)
    with jax.enable_x64(True):
        double = gaussian.split_noise(schedule, t, s, 1.0)
    for ours, exact in zip(single, double, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=1e-5)


def evaluate(name, schedule, t, s):
    """The public function at steps [B], as a tuple of arrays; those of one time are evaluated at t."""
    ones = jnp.ones(np.shape(t))
    function = getattr(gaussian, name)
    if name == "posterior":
        return function(schedule, ones, ones, t, s)
    if name in ("ddim_sigma", "split_noise"):
        return np.atleast_2d(function(schedule, t, s, 0.5))
    return (function(schedule, ones, t, ones),)


@pytest.mark.parametrize("name", ["posterior", "ddim_sigma", "split_noise"])
def test_a_step_that_does_not_descend_in_range_is_nan(name):
    t = np.array([5, 5, 0, T + 1, T + 5, 5, 5, 2**31 - 1])
    s = np.array([5, 6, 0, T, 5, -1, -T, 3])
    for part in evaluate(name, LINEAR, t, s):
        assert np.all(np.isnan(part))


@pytest.mark.parametrize("name", ["q_sample", "predict_x0", "predict_eps", "velocity"])
def test_a_time_outside_the_schedule_is_nan(name):
    t = np.array([-1, -T, T + 1, 2 * T, -(2**31)])
    assert np.all(np.isnan(evaluate(name, LINEAR, t, t)[0]))
    assert np.all(np.isfinite(evaluate(name, LINEAR, np.array([1, T]), None)[0]))


@pytest.mark.parametrize("name", PUBLIC)
@every_schedule
def test_nothing_is_nan_inside_the_schedule(schedule, name):
    t, s = (ALL_T, ALL_S) if name in ("posterior", "ddim_sigma", "split_noise") else (np.arange(1, T), None)
    for part in evaluate(name, schedule, t, s):
        assert np.all(np.isfinite(part))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_scalar_timestep_is_a_batch_of_equal_timesteps(name):
    x, y = jnp.asarray(images((4, 2, 2, 3), 1)), jnp.asarray(images((4, 2, 2, 3), 2))
    function = getattr(gaussian, name)
    if name in ("ddim_sigma", "split_noise"):
        call = partial(lambda t, s: function(LINEAR, t, s, 0.7))
    elif name == "posterior":
        call = partial(function, LINEAR, x, y)
    else:
        call = partial(lambda t, s: function(LINEAR, x, t, y))
    batch = jax.tree.leaves(call(np.full(4, 400), np.full(4, 200)))
    for t, s in ((400, 200), (np.int32(400), np.int32(200)), (jnp.int32(400), np.full(4, 200))):
        for one, many in zip(jax.tree.leaves(call(t, s)), batch, strict=True):
            np.testing.assert_allclose(np.broadcast_to(one, many.shape), many, rtol=1e-6)


def test_each_sample_has_its_own_timestep():
    x, eps = jnp.asarray(images((3, 2, 2, 1), 1)), jnp.asarray(images((3, 2, 2, 1), 2))
    t = np.array([1, 500, T])
    together = gaussian.q_sample(LINEAR, x, t, eps)
    for i in range(3):
        alone = gaussian.q_sample(LINEAR, x[i : i + 1], int(t[i]), eps[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_compile_once_for_a_shape(name):
    function = getattr(gaussian, name)
    evaluate(name, LINEAR, np.full(17, 400), np.full(17, 200))
    compiled = function._cache_size()
    assert compiled >= 1
    evaluate(name, SCHEDULES["cosine"], np.arange(17) + 2, np.arange(17))
    assert function._cache_size() == compiled


def test_whole_numbers_as_images_are_not_cut_to_whole_coefficients():
    whole, eps = np.array([[1, -1], [0, 1]]), np.zeros((2, 2), np.float32)
    try:
        x_t = gaussian.q_sample(LINEAR, whole, 500, eps)
    except (TypeError, ValueError):
        return
    np.testing.assert_allclose(x_t, gaussian.q_sample(LINEAR, whole.astype(np.float32), 500, eps))
