"""Laws of image-to-image and of noise interpolation."""

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


def test_below_refuses_a_start_outside_the_grid():
    tau = timesteps.uniform(SCHEDULE, 10)
    np.testing.assert_array_equal(timesteps.below(SCHEDULE, tau, 250), [200, 100, 0])
    for start in (99, 1001, np.nan):
        with refused("start is"):
            timesteps.below(SCHEDULE, tau, start)


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
