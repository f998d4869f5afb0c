"""Laws of image-to-image and of noise interpolation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from reference import gaussian_denoiser, ideal_network, refused

import diffusion
from diffusion import editing, schedules, solvers, timesteps

SCHEDULE = schedules.linear()
KEY = jax.random.key(3)


def test_noised_at_the_top_is_the_start_of_sampling_and_at_zero_the_image():
    images = jnp.full((3, 4, 4, 1), 0.5)
    ids = jnp.array([7, 1, 9])
    table = solvers.ddim(SCHEDULE, timesteps.uniform(SCHEDULE, 2))
    network = lambda params, x, t, cond: x  # noqa: E731
    options = {"sample_ids": ids, "return_trajectory": True}
    _, passed = diffusion.sample(network, {}, table, KEY, 3, (4, 4, 1), **options)
    signal, noise = SCHEDULE.at(1000)
    top = editing.noised(SCHEDULE, images, 1000, KEY, ids)
    np.testing.assert_allclose(top, signal * images + noise * passed.x[0], atol=1e-6)
    np.testing.assert_array_equal(editing.noised(SCHEDULE, images, 0, KEY), images)


def test_image_to_image_of_the_right_denoiser_keeps_what_the_noise_left(float64):
    """On Gaussian data the map from x_t to x_0 is affine and known; nearer starts keep more of the image."""
    mean, variance = 0.2, 0.3
    network = ideal_network(SCHEDULE, lambda x, a, n: gaussian_denoiser(x, a, n, mean, variance))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    for start in (100, 600):
        tau = timesteps.below(SCHEDULE, timesteps.uniform(SCHEDULE, 1000), start)
        assert tau[0] == start
        x_init = editing.noised(SCHEDULE, images, start, KEY)
        table = solvers.ddim(SCHEDULE, tau)
        out = diffusion.sample(network, {}, table, KEY, 4, (5,), prediction="x0", x_init=x_init)
        signal, noise = SCHEDULE.at(start)
        exact = mean + np.sqrt(variance / (signal**2 * variance + noise**2)) * (x_init - signal * mean)
        np.testing.assert_allclose(out, exact, atol=5e-3)


def test_below_starts_at_the_time_asked_for_and_refuses_one_that_is_none():
    tau = timesteps.uniform(SCHEDULE, 10)
    np.testing.assert_array_equal(timesteps.below(SCHEDULE, tau, 250), [250, 200, 100, 0])
    np.testing.assert_array_equal(timesteps.below(SCHEDULE, tau, 200), [200, 100, 0])
    np.testing.assert_array_equal(timesteps.below(SCHEDULE, tau, 40.5), [40.5, 0])
    np.testing.assert_array_equal(
        timesteps.below(SCHEDULE, timesteps.leading(SCHEDULE, 4), 1000), [1000, 751, 501, 251, 1, 0]
    )
    for start in (0, -1, 1001, np.nan):
        with refused("start is"):
            timesteps.below(SCHEDULE, tau, start)


def test_image_to_image_is_exact_on_gaussian_data_from_any_start():
    """Noised data has the moments of x_t, from which a sampler of optimal variance makes those of the data again."""
    mean, variance = 0.5, 0.25
    for start in (999, 630, 41.5, 3):
        for steps in (1, 3, 25):
            tau = timesteps.below(SCHEDULE, timesteps.uniform(SCHEDULE, steps), start)
            signal, noise = SCHEDULE.at(tau[:-1])
            gamma = noise**2 / (signal**2 * variance + noise**2)
            table = solvers.analytic_dpm(SCHEDULE, tau, gamma)
            a, n = SCHEDULE.at(start)  # what `noised` makes of the data at the time asked for
            moments = solvers.gaussian_moments(table, mean, variance, (a * mean, a**2 * variance + n**2))
            # The last step injects no noise, and so lacks the variance of x_0 given x at tau[-2].
            last = SCHEDULE.at(tau[-2])
            np.testing.assert_allclose(moments[0], mean, rtol=1e-9)
            lacks = variance * last[1] ** 2 / (last[0] ** 2 * variance + last[1] ** 2)
            np.testing.assert_allclose(moments[1], variance - lacks, rtol=1e-9)


def test_slerp_runs_along_the_arc_at_even_speed():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True)) for v in rng.normal(size=(2, 6, 40)))
    angle = np.arccos(np.sum(a * b, axis=-1))
    for weight in (0.0, 0.25, 0.5, 1.0):
        point = np.asarray(editing.slerp(a, b, weight))
        np.testing.assert_allclose(np.linalg.norm(point, axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(np.arccos(np.clip(np.sum(point * a, -1), -1, 1)), weight * angle, atol=2e-3)
    np.testing.assert_allclose(editing.slerp(a, b, 1.0), b, atol=1e-6)


def test_slerp_of_parallel_noises_is_the_straight_line():
    a = jnp.ones((2, 3))
    np.testing.assert_allclose(editing.slerp(a, 2 * a, jnp.array([0.5, 0.25])), [[1.5] * 3, [1.25] * 3], atol=1e-6)
    assert np.all(np.isfinite(editing.slerp(a, -a, 0.5)))
    assert np.all(np.isfinite(editing.slerp(0 * a, a, 0.5)))
    with refused("shapes"):
        editing.slerp(a, a[:1], 0.5)


def arc(a, b, weight):
    """The formula itself, in double precision."""
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle)


def test_slerp_and_its_gradient_are_those_of_the_arc_up_to_equal_ends():
    rng = np.random.default_rng(2)
    a, off, out = rng.normal(size=(3, 8))
    weight = 0.3

    @partial(jax.grad, argnums=(0, 1))
    def pull(a, b):
        return jnp.sum(jnp.asarray(out) * editing.slerp(a[None], b[None], weight)[0])

    with jax.enable_x64(True):
        for distance in (1.0, 1e-3):
            b = a + distance * off
            np.testing.assert_allclose(editing.slerp(a[None], b[None], weight)[0], arc(a, b, weight), rtol=1e-9)
            # Against central differences of the formula.
            steps = 1e-5 * np.eye(8)
            slope = [(arc(a + s, b, weight) - arc(a - s, b, weight)) @ out / 2e-5 for s in steps]
            np.testing.assert_allclose(jax.jit(pull)(a, b)[0], slope, atol=1e-5)
    for dtype in (jnp.float32, jnp.bfloat16):
        same = jnp.asarray(a, dtype)
        np.testing.assert_array_equal(editing.slerp(same[None], same[None], weight)[0], same)
        slopes = jax.jit(pull)(same, same)
        for slope, share in zip(slopes, (0.7, 0.3), strict=True):  # the straight line's
            np.testing.assert_allclose(np.asarray(slope, float), share * out, atol=0.05 * np.abs(out).max())
    for end in (-a, 0 * a):  # no arc
        gradients = jax.jit(pull)(jnp.asarray(a, jnp.float32), jnp.asarray(end, jnp.float32))
        assert np.all(np.isfinite(gradients))
