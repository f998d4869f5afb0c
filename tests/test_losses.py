"""Laws of the training objective and of the timesteps it is evaluated at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

from diffusion import gaussian, schedules
from diffusion.losses import TARGETS, simple_loss, stratified_timesteps

LINEAR = schedules.linear()


def batch_keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def zero_network(x_t, t, cond):
    return jnp.zeros_like(x_t)


@pytest.mark.parametrize(("batch", "total"), [(1, 1000), (8, 1000), (100, 1000), (1000, 1000), (64, 4096), (5, 10)])
def test_stratified_timesteps_hold_one_from_each_equal_part(batch, total):
    part = total // batch
    for seed in range(20):
        uniforms = jax.random.uniform(jax.random.key(seed), (batch,), minval=1e-3, maxval=1 - 1e-3)
        t = np.asarray(stratified_timesteps(uniforms, jnp.arange(batch), batch, total))
        np.testing.assert_array_equal((t - 1) // part, np.arange(batch))


@pytest.mark.parametrize(("batch", "total"), [(7, 1000), (128, 1000), (300, 7)])
def test_parts_that_do_not_divide_the_timesteps_differ_by_one_at_most(batch, total):
    uniforms = jax.random.uniform(jax.random.key(0), (batch,))
    t = np.asarray(stratified_timesteps(uniforms, jnp.arange(batch), batch, total))
    assert np.all(np.diff(t) >= 0)
    lowest = np.arange(batch) * total / batch
    assert np.all((t >= lowest - 1e-3) & (t <= lowest + total / batch + 1 + 1e-3))


def test_each_timestep_is_equally_likely():
    """Five standard deviations of a binomial count, for each of 10 timesteps."""
    rounds, batch, total = 20_000, 4, 10
    uniforms = jax.random.uniform(jax.random.key(3), (rounds, batch))
    draw = jax.vmap(lambda u: stratified_timesteps(u, jnp.arange(batch), batch, total))
    counts = np.bincount(np.asarray(draw(uniforms)).ravel(), minlength=total + 1)
    assert counts[0] == 0
    assert counts.size == total + 1
    expected = rounds * batch / total
    assert np.max(np.abs(counts[1:] - expected)) < 5 * expected**0.5


@pytest.mark.parametrize("batch", [1, 2, 128, 1000, 4096, 100_000])
@pytest.mark.parametrize("total", [1, 1000, 4000])
def test_timesteps_stay_in_range_at_both_ends_of_the_uniforms(batch, total):
    index = jnp.arange(batch)
    for extreme in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        t = np.asarray(stratified_timesteps(jnp.full(batch, extreme, jnp.float32), index, batch, total))
        assert t.dtype == np.int32
        assert t.min() >= 1
        assert t.max() <= total
    assert t.max() == total


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prediction", TARGETS)
def test_the_exact_predictor_has_no_loss(prediction):
    """A network that knows x_0 finds eps and v from x_t."""
    x_0 = jax.random.normal(jax.random.key(1), (32, 4, 4, 3))

    def knows_x0(x_t, t, cond):
        eps = gaussian.predict_eps(LINEAR, x_t, t, cond)
        v = gaussian.velocity(LINEAR, cond, t, eps)
        return {"eps": eps, "x0": cond, "v": v, "flow": eps - cond}[prediction]

    run = jax.jit(lambda x, keys: simple_loss(knows_x0, LINEAR, x, x, keys, jnp.arange(32), 32, prediction))
    loss = run(x_0, batch_keys(32))
    assert loss.shape == (32,)
    np.testing.assert_allclose(loss, 0, atol=1e-20)


def test_the_zero_network_loses_the_variance_of_its_target():
    """Five standard errors; E eps^2 = 1, x_0^2 is known, and v has variance a^2 + n^2 x_0^2 for fixed x_0."""
    x_0 = jnp.full((256, 16, 16, 1), 0.5)
    run = jax.jit(
        lambda prediction: simple_loss(
            zero_network, LINEAR, x_0, None, batch_keys(256), jnp.arange(256), 256, prediction
        ),
        static_argnums=0,
    )
    pixels = x_0.size
    assert abs(np.mean(run("eps")) - 1) < 5 * (2 / pixels) ** 0.5
    np.testing.assert_allclose(run("x0"), 0.25, rtol=1e-6)
    # Stratified times: the mean over t of a^2 + n^2 / 4 is within one part's variation of the mean over 1..T.
    expected = np.mean(LINEAR.alpha_bar[1:] + LINEAR.noise_var[1:] / 4)
    assert abs(np.mean(run("v")) - expected) < 5 * (2 / pixels) ** 0.5 + 1 / 256


def test_the_loss_is_the_squared_error_at_the_timestep_the_network_was_given():
    x_0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
    seen = {}

    def network(x_t, t, cond):
        seen.update(x_t=x_t, t=t)
        return 0.1 * x_t

    loss = simple_loss(network, LINEAR, x_0, None, batch_keys(8), jnp.arange(8), 8)
    eps = gaussian.predict_eps(LINEAR, seen["x_t"], seen["t"], x_0)
    wanted = np.mean(np.asarray(0.1 * seen["x_t"] - eps) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, wanted, rtol=1e-3)
    np.testing.assert_array_equal((seen["t"] - 1) // 125, np.arange(8))
    assert abs(np.mean(eps)) < 5 / eps.size**0.5
    assert np.abs(np.corrcoef(np.asarray(eps).reshape(8, -1)) - np.eye(8)).max() < 0.9


def test_the_loss_of_a_sample_does_not_depend_on_the_batch_around_it():
    x_0, index, cond = jax.random.normal(jax.random.key(1), (8, 4, 4, 1)), jnp.arange(8), jnp.linspace(-1, 1, 8)

    def network(x_t, t, cond):
        return jnp.tanh(x_t * cond[:, None, None, None]) + t[:, None, None, None] / 1000

    @jax.jit
    def loss(part):
        return simple_loss(network, LINEAR, x_0[part], cond[part], batch_keys(8)[part], index[part], 8)

    whole = loss(np.arange(8))
    for part in (np.array([6]), np.array([5, 2, 7, 0, 1, 3, 6, 4])):
        np.testing.assert_allclose(loss(part), whole[part], rtol=1e-5)


def test_an_unknown_prediction_is_refused_with_the_nearest_name():
    with refused("'epsilon'; did you mean 'eps'"):
        simple_loss(zero_network, LINEAR, jnp.zeros((1, 2, 2, 1)), None, batch_keys(1), jnp.arange(1), 1, "epsilon")
