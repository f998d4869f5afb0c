"""Laws of noise that is drawn by time: what a path is, whom it belongs to, and that other numbers of steps see it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import Brownian, sampling, schedules, solvers, testbeds, timesteps
from diffusion.solvers import ddim, ddpm, make_table

LINEAR = schedules.linear()
KEY = jax.random.key(3)
PATH = Brownian(1000)


def only_noise(tau):
    """A table whose register 0 is the noise of the stage before."""
    signal, noise = LINEAR.at(tau[:-1])
    return make_table("noise", tau, tau[:-1], signal, noise, np.tile([0.0, 0.0, 1.0], (len(tau) - 1, 1, 1)))


def network(params, x, t, cond=None):
    return 0.9 * x


def drawn(table, ids=(0, 1, 2), key=KEY, noise=PATH, **options):
    return diffusion.sample(
        network, None, table, key, len(ids), (2, 2, 1), sample_ids=np.array(ids), noise=noise, **options
    )


def noises(steps):
    """The noise of each step, [steps, N]."""
    table = only_noise(timesteps.uniform(LINEAR, steps))
    return np.asarray(drawn(table, return_trajectory=True)[1].x)[1:].reshape(steps, -1)


def test_a_path_is_a_brownian_motion():
    """W at two places has the covariance of the lower one; 17 places, over 20,000 paths."""
    path, count = Brownian(1.0, depth=4), 20_000
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(count))
    found = np.asarray(jax.jit(jax.vmap(lambda place: path.at(keys, place, (1,))[:, 0]))(jnp.arange(17)))
    expected = np.minimum.outer(np.arange(17), np.arange(17)).astype(float)
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / count)
    assert np.all(np.abs(found @ found.T / count - expected) <= 5 * spread)


def test_the_noise_of_a_step_is_the_sum_of_that_of_its_halves():
    coarse, fine = noises(4), noises(8)
    np.testing.assert_allclose(coarse, (fine[::2] + fine[1::2]) / np.sqrt(2), rtol=0, atol=2e-5)


def test_other_numbers_of_steps_make_the_same_images_and_did_not_before():
    """Stochastic DDIM in 25 and in 50 steps, by the correlation of their images."""
    tables = [ddim(LINEAR, timesteps.uniform(LINEAR, steps), eta=1.0) for steps in (25, 50)]
    ids = range(200)
    correlations = [np.corrcoef([np.ravel(drawn(t, ids, noise=noise)) for t in tables])[0, 1] for noise in (PATH, None)]
    assert correlations[0] > 0.97
    assert correlations[1] < 0.6


def test_samples_have_the_distribution_that_the_table_gives_them():
    """On Gaussian data, against the exact moments, within five standard errors."""
    table, mean, variance = ddpm(LINEAR, timesteps.uniform(LINEAR, 7)), 0.3, 0.2
    bed = testbeds.gaussian(LINEAR, mean, variance)
    found = diffusion.sample(bed.apply_fn, bed.params, table, KEY, 1000, (2, 2, 1), noise=PATH)
    expected_mean, expected = solvers.gaussian_moments(table, mean, variance)
    assert abs(np.mean(found) - expected_mean) < 5 * np.sqrt(expected / found.size)
    assert abs(np.var(found) / expected - 1) < 5 * np.sqrt(2 / found.size)


def test_a_sample_has_its_path_whatever_is_around_it():
    table = ddim(LINEAR, timesteps.uniform(LINEAR, 5), eta=1.0)
    all_, some = drawn(table, (0, 1, 2, 3)), drawn(table, (3, 1))
    np.testing.assert_allclose(np.asarray(some), np.asarray(all_)[[3, 1]], rtol=0, atol=1e-6)
    other = drawn(table, (0, 1, 2, 3), key=jax.random.key(4))
    assert np.all(np.abs(np.asarray(other) - np.asarray(all_)).max(axis=(1, 2, 3)) > 1e-2)


def test_one_compilation_serves_all_tables_of_a_shape_and_transformations_go_through():
    tables = [ddim(LINEAR, timesteps.uniform(LINEAR, 6), eta) for eta in (0.3, 1.0)]
    before = sampling._run._cache_size()
    found = [drawn(table) for table in tables]
    drawn(ddpm(LINEAR, timesteps.quadratic(LINEAR, 6)))
    assert sampling._run._cache_size() == before + 1
    inside = jax.jit(drawn)(tables[1])
    np.testing.assert_allclose(inside, found[1], rtol=0, atol=1e-5)
    keys = jax.random.split(KEY, 2)
    many = jax.vmap(lambda key: drawn(tables[1], key=key))(keys)
    np.testing.assert_allclose(many[1], drawn(tables[1], key=keys[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [partial(solvers.dpm_solver, order=2, eta=1.0), solvers.dpm_solver_pp_sde])
def test_steps_of_several_calls_share_the_way_down_without_overlap(solver):
    tau = timesteps.log_snr(LINEAR, 5)
    table = solver(LINEAR, tau)
    draws = np.any(table.update[:, :, -1] != 0, axis=1)
    found = PATH.intervals(table)[draws]
    assert np.all(found[:, 1] > found[:, 0])
    np.testing.assert_array_equal(found[1:, 0], found[:-1, 1])
    # The noise of a step that draws once is that of its whole length.
    ends = np.round((1 - tau / 1000) * 2**16)
    assert found[0, 0] == 0
    assert set(found[:, 1]) >= set(ends[1 : draws.sum() if draws.sum() < len(tau) - 1 else -1])


def test_what_has_no_path_is_refused():
    tau = timesteps.uniform(LINEAR, 5)
    stochastic = ddim(LINEAR, tau, eta=1.0)
    with refused("draws no noise"):
        drawn(ddim(LINEAR, tau))
    with refused("for no time of its own"):
        drawn(solvers.resampled(stochastic, 2))
    with refused("for no time of its own"):
        drawn(solvers.langevin(stochastic))
    with refused("tau starts at 1000, and the noise at 500"):
        drawn(stochastic, noise=Brownian(500))
    with refused("horizon of the noise is -1"):
        drawn(stochastic, noise=Brownian(-1))
    with refused("depth of the noise is 0"):
        drawn(stochastic, noise=Brownian(1000, depth=0))
    with refused("fewer steps"):
        drawn(stochastic, noise=Brownian(1000, depth=2))
    with refused("noise is a str"):
        drawn(stochastic, noise="brownian")
