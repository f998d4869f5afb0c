"""Laws of the scan that runs a table: what is drawn, from which keys, with which calls and compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gaussian_denoiser, ideal_network, mixture_denoiser, refused

import diffusion
from diffusion import sampling, schedules, timesteps
from diffusion.models import UNet, as_apply_fn
from diffusion.solvers import ddim, ddpm, gaussian_moments, make_table

LINEAR = schedules.linear()
ZERO_SNR = schedules.zero_terminal_snr(LINEAR)


def key(seed=0):
    return jax.random.key(seed)


def uniform_table(steps, eta=0.0, schedule=LINEAR):
    return ddim(schedule, timesteps.uniform(schedule, steps), eta)


def no_noise(params, x, t, cond=None):
    """A network that predicts 0."""
    return jnp.zeros_like(x)


def tanh_network(params, x, t, cond=None):
    """A smooth elementwise network with a parameter and, if given, a condition for each sample."""
    shift = 0.0 if cond is None else cond.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.tanh(params["slope"] * x + shift) * (t.reshape((-1,) + (1,) * (x.ndim - 1)) / 1000)


MIXTURE = {p: ideal_network(LINEAR, lambda x, a, n: mixture_denoiser(x, a, n, jnp), p) for p in ("eps", "x0", "v")}


def amplified(params, x, t, cond=None):
    """An eps-model that is wrong enough to leave [-1, 1]."""
    return 1.3 * MIXTURE["eps"](params, x, t, cond)


GAUSSIAN = ideal_network(LINEAR, lambda x, a, n: gaussian_denoiser(x, a, n, 0.4, 0.25), "eps")
SLOPE = {"slope": jnp.array(0.7)}


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_gaussian_data_is_sampled_to_the_mean_and_variance_the_table_predicts(steps):
    """Five standard errors of 2^18 independent pixels."""
    number, width = 64, 4096
    tables = [uniform_table(steps, eta) for eta in (0.0, 0.5, 1.0)]
    tables.append(ddpm(LINEAR, timesteps.uniform(LINEAR, steps), "large"))
    for table in tables:
        mean, variance = gaussian_moments(table, 0.4, 0.25)
        x = np.asarray(diffusion.sample(GAUSSIAN, {}, table, key(1), number, (width,)), np.float64)
        assert abs(x.mean() - mean) < 5 * (variance / x.size) ** 0.5 + 1e-5
        assert abs(x.var() - variance) < 5 * variance * (2 / x.size) ** 0.5 + 1e-5


def test_start_and_noise_of_all_stages_are_independent_standard_normals():
    stages, width = 6, 20_000
    only_noise = np.tile([[[0.0, 0.0, 1.0]]], (stages, 1, 1))
    table = make_table(
        "noise", np.arange(stages, -1, -1), np.arange(stages, 0, -1), *np.full((2, stages), 0.7), only_noise
    )
    _, path = diffusion.sample(no_noise, {}, table, key(), 3, (width,), return_trajectory=True)
    draws = np.asarray(path.x, np.float64).reshape(-1, width)  # (stage, sample) x pixels
    assert draws.shape[0] == (stages + 1) * 3
    bound = 5 / width**0.5
    assert np.max(np.abs(draws.mean(axis=1))) < bound
    covariance = draws @ draws.T / width
    assert np.max(np.abs(covariance - np.eye(len(draws)))) < bound * 2**0.5


@pytest.fixture(scope="module")
def small_unet():
    """A UNet whose weights are all random, also those that start at zero."""
    model = UNet(width=8, multipliers=(1, 2), num_blocks=0, attention_resolutions=(8,))
    shapes = jax.eval_shape(model.init, key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(1))["params"]
    rng = np.random.default_rng(1)
    return as_apply_fn(model), jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), s.dtype), shapes)


def in_batches(size, apply_fn, params, table, shape, **options):
    parts = []
    for start in range(0, 64, size):
        ids = np.arange(start, min(start + size, 64))
        parts.append(diffusion.sample(apply_fn, params, table, key(2), ids.size, shape, sample_ids=ids, **options))
    return np.concatenate(parts)


def test_the_same_64_samples_come_from_batches_of_1_7_and_64_of_a_unet(small_unet):
    table = uniform_table(3, eta=1.0)
    together = diffusion.sample(*small_unet, table, key(2), 64, (8, 8, 1), clip="recompute")
    assert np.std(together) > 0.1
    for size in (1, 7):
        np.testing.assert_allclose(
            in_batches(size, *small_unet, table, (8, 8, 1), clip="recompute"), together, atol=1e-5
        )


def test_the_same_64_samples_come_from_any_batch_to_the_last_bit_of_an_elementwise_network():
    table = uniform_table(5, eta=1.0)
    together = diffusion.sample(tanh_network, SLOPE, table, key(2), 64, (3, 2))
    for size in (1, 7):
        np.testing.assert_array_equal(in_batches(size, tanh_network, SLOPE, table, (3, 2)), together)


def test_a_sample_depends_on_its_id_and_condition_alone():
    table, cond = uniform_table(4, eta=0.5), jnp.linspace(-1, 1, 8)
    x = diffusion.sample(tanh_network, SLOPE, table, key(), 8, (5,), cond=cond)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    permuted = diffusion.sample(tanh_network, SLOPE, table, key(), 8, (5,), cond=cond[order], sample_ids=order)
    np.testing.assert_array_equal(permuted, x[order])
    one_id = diffusion.sample(tanh_network, SLOPE, table, key(), 3, (5,), sample_ids=jnp.array([9, 9, 100_000]))
    np.testing.assert_array_equal(one_id[0], one_id[1])
    assert not np.any(one_id[0] == one_id[2])
    other_cond = diffusion.sample(tanh_network, SLOPE, table, key(), 8, (5,), cond=cond + 1)
    assert not np.any(other_cond == x)


def test_the_key_decides_the_samples():
    table = uniform_table(4, eta=0.5)
    x, same, other = (diffusion.sample(tanh_network, SLOPE, table, key(k), 4, (5,)) for k in (0, 0, 1))
    np.testing.assert_array_equal(x, same)
    assert not np.any(x == other)


def test_whole_sample_ids_alone_are_taken():
    with refused("sample_ids"):
        diffusion.sample(no_noise, {}, uniform_table(2), key(), 2, (3,), sample_ids=jnp.array([0.5, 1.5]))


def counting(network):
    """The network and a list that grows by one for each trace."""
    traces = []

    def apply_fn(params, x, t, cond=None):
        traces.append(x.shape)
        return network(params, x, t, cond)

    return apply_fn, traces


def test_one_compilation_serves_all_tables_of_a_shape():
    apply_fn, traces = counting(tanh_network)
    before = sampling._run._cache_size()
    grids = (timesteps.uniform, timesteps.quadratic, timesteps.log_snr)
    tables = [ddim(LINEAR, grid(LINEAR, 6), eta) for grid in grids for eta in (0.0, 0.3, 1.0)]
    tables += [ddpm(LINEAR, grid(LINEAR, 6), variance) for grid in grids for variance in ("small", "large")]
    tables.append(ddim(schedules.cosine(), timesteps.uniform(LINEAR, 6)))
    for table in tables:
        for prediction in ("eps", "x0", "v"):
            diffusion.sample(apply_fn, SLOPE, table, key(), 2, (3,), prediction=prediction)
    assert sampling._run._cache_size() == before + 1
    traced = len(traces)
    diffusion.sample(apply_fn, SLOPE, uniform_table(7), key(), 2, (3,))
    assert len(traces) == 2 * traced


def test_a_callers_jit_compiles_once_for_all_tables_of_a_shape():
    apply_fn, traces = counting(no_noise)
    run = jax.jit(lambda table: diffusion.sample(apply_fn, {}, table, key(), 2, (3,)))
    run(uniform_table(5, eta=0.0))
    traced = len(traces)
    run(uniform_table(5, eta=0.5))
    run(ddpm(LINEAR, timesteps.quadratic(LINEAR, 5), "large"))
    assert len(traces) == traced


def times_seen(table, **options):
    seen = []

    def spy(params, x, t, cond=None):
        jax.debug.callback(lambda t: seen.append(np.asarray(t, np.float64)), t, ordered=True)
        return jnp.zeros_like(x)

    diffusion.sample(spy, {}, table, key(), 3, (2,), **options)
    jax.effects_barrier()
    return np.array(seen)


@pytest.mark.parametrize("tau", [[1000, 0], [1000, 857, 430, 3, 0], [999.5, 10.25, 0.5, 0]], ids=str)
def test_the_network_is_called_once_for_each_step_at_the_times_of_tau(tau):
    table = ddim(LINEAR, timesteps.explicit(LINEAR, tau), 0.5)
    for options in ({}, {"return_trajectory": True, "clip": "recompute"}):
        seen = times_seen(table, **options)
        assert len(seen) == table.nfe == len(tau) - 1
        np.testing.assert_array_equal(seen, np.tile(np.array(tau[:-1])[:, None], (1, 3)))


def test_the_network_is_called_once_for_each_of_a_thousand_steps():
    seen = times_seen(uniform_table(1000))
    np.testing.assert_array_equal(seen[:, 0], np.arange(1000, 0, -1))


def test_a_run_in_half_precision_still_tells_the_network_the_true_times():
    """bfloat16 has 8 bits: 857 would become 856."""
    seen = times_seen(uniform_table(7), x_init=jnp.ones((3, 2), jnp.bfloat16))
    np.testing.assert_array_equal(seen[:, 0], timesteps.uniform(LINEAR, 7)[:-1])


@pytest.mark.usefixtures("float64")
def test_eps_x0_and_v_predictions_of_one_denoiser_give_the_same_samples():
    """With keep_eps, which uses the estimate both before and after clipping."""
    table = uniform_table(8, eta=0.5)
    eps, x0, v = (
        diffusion.sample(MIXTURE[p], {}, table, key(), 16, (3,), prediction=p, clip="keep_eps")
        for p in ("eps", "x0", "v")
    )
    assert eps.dtype == np.float64
    np.testing.assert_allclose(x0, eps, rtol=0, atol=1e-10)
    np.testing.assert_allclose(v, eps, rtol=0, atol=1e-10)


def noise_of(seed, ids, stage, shape):
    """The documented derivation: fold in the sample id, then the stage; stage 0 is the start."""
    keys = [jax.random.fold_in(jax.random.fold_in(key(seed), i), stage) for i in ids]
    return np.stack([jax.random.normal(k, shape, np.float64) for k in keys])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("clip", ["none", "recompute", "keep_eps"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_sampling_is_ddim_step_by_step_with_each_kind_of_clipping(clip, eta):
    """Against a plain loop over Eq. 12, with eps either as predicted or recomputed from the clipped x_0."""
    tau, ids = timesteps.uniform(LINEAR, 6), [4, 2, 11]
    x = noise_of(3, ids, 0, (2,))
    (a, n), clipped = LINEAR.at(tau), 0
    for i in range(6):
        eps = np.asarray(jax.jit(amplified)({}, jnp.asarray(x), jnp.full(3, tau[i], np.float64)))
        x0 = (x - n[i] * eps) / a[i]
        clipped += np.sum(np.abs(x0) > 1)
        if clip != "none":
            x0 = np.clip(x0, -1, 1)
        if clip == "recompute":
            eps = (x - a[i] * x0) / n[i]
        sigma = eta * n[i + 1] / n[i] * np.sqrt(1 - a[i] ** 2 / a[i + 1] ** 2)
        z = noise_of(3, ids, i + 1, (2,))
        x = a[i + 1] * x0 + np.sqrt(n[i + 1] ** 2 - sigma**2) * eps + sigma * z
    assert clipped > 3

    got = diffusion.sample(amplified, {}, ddim(LINEAR, tau, eta), key(3), 3, (2,), clip=clip, sample_ids=np.array(ids))
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_clip_accepts_the_plain_words_for_its_options():
    def run(clip):
        return diffusion.sample(tanh_network, SLOPE, uniform_table(4), key(), 2, (3,), clip=clip)

    np.testing.assert_array_equal(run(True), run("recompute"))
    np.testing.assert_array_equal(run(False), run("none"))
    np.testing.assert_array_equal(run(None), run("none"))
    assert np.max(np.abs(run("none"))) > 1 >= np.max(np.abs(run("recompute")))


def test_the_trajectory_is_that_of_the_plain_run():
    table, options = uniform_table(5, eta=1.0), {"clip": "recompute"}
    plain = diffusion.sample(tanh_network, SLOPE, table, key(), 4, (3, 2), **options)
    x, path = diffusion.sample(tanh_network, SLOPE, table, key(), 4, (3, 2), return_trajectory=True, **options)
    assert path.x.shape == (6, 4, 3, 2)
    assert path.x0.shape == (5, 4, 3, 2)
    np.testing.assert_array_equal(x, plain)
    np.testing.assert_array_equal(path.x[-1], x)
    np.testing.assert_array_equal(path.x0[-1], x)  # the last step returns the denoised estimate
    assert np.max(np.abs(path.x0)) <= 1
    eps = tanh_network(SLOPE, path.x[1], jnp.full(4, table.t[1]))
    wanted = np.clip((path.x[1] - table.noise[1] * eps) / table.signal[1], -1, 1)
    np.testing.assert_allclose(path.x0[1], wanted, rtol=1e-4, atol=1e-4)


def test_x_init_is_the_start():
    table, x_init = uniform_table(3), jnp.arange(6.0).reshape(2, 3)
    x, path = diffusion.sample(tanh_network, SLOPE, table, key(), 2, (3,), x_init=x_init, return_trajectory=True)
    np.testing.assert_array_equal(path.x[0], x_init)
    other_key = diffusion.sample(tanh_network, SLOPE, table, key(5), 2, (3,), x_init=x_init)
    np.testing.assert_array_equal(other_key, x)  # at eta = 0 nothing else is random


def test_sampling_is_fit_for_vmap_over_keys():
    table = uniform_table(3, eta=1.0)
    keys = jax.random.split(key(), 3)
    together = jax.vmap(lambda k: diffusion.sample(tanh_network, SLOPE, table, k, 2, (3,)))(keys)
    for i in range(3):
        alone = diffusion.sample(tanh_network, SLOPE, table, keys[i], 2, (3,))
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_gradients_with_respect_to_table_and_parameters_are_those_of_finite_differences():
    table, params = uniform_table(4, eta=0.5), {"slope": jnp.array(0.7)}

    def loss(table, params):
        return jnp.mean(diffusion.sample(tanh_network, params, table, key(), 4, (3,)) ** 2)

    by_table, by_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(table, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((by_table, by_params)))
    # Each row of the table moves the loss, and so do the times given to the network.
    assert np.all(np.any(by_table.update[:-1] != 0, axis=(1, 2)))
    assert np.all(by_table.t != 0)

    step = 1e-6
    change = loss(table, {"slope": params["slope"] + step}) - loss(table, {"slope": params["slope"] - step})
    np.testing.assert_allclose(by_params["slope"], change / (2 * step), rtol=1e-6)
    for leaf, index in (("update", (1, 0, 1)), ("update", (2, 0, 2)), ("t", (1,)), ("signal", (2,)), ("noise", (1,))):
        losses = []
        for sign in (1, -1):
            values = {f: np.array(getattr(table, f)) for f in ("tau", "t", "signal", "noise", "update")}
            size = step * max(1, abs(values[leaf][index]))
            values[leaf][index] += sign * size
            losses.append(loss(make_table("moved", **values), params))
        np.testing.assert_allclose(getattr(by_table, leaf)[index], (losses[0] - losses[1]) / (2 * size), rtol=1e-5)


def test_an_eps_model_is_refused_at_zero_signal_and_v_and_x0_models_are_not():
    table = uniform_table(5, eta=1.0, schedule=ZERO_SNR)
    with refused("zero signal.*x0, v, flow"):
        diffusion.sample(no_noise, {}, table, key(), 2, (3,))
    for prediction in ("v", "x0"):
        network = ideal_gaussian_at_zero_signal(prediction)
        x = diffusion.sample(network, {}, table, key(), 64, (1024,), prediction=prediction)
        mean, variance = gaussian_moments(table, 0.4, 0.25)
        assert abs(np.mean(x) - mean) < 5 * (variance / x.size) ** 0.5 + 1e-5
        assert abs(np.var(x) / variance - 1) < 5 * (2 / x.size) ** 0.5 + 1e-4
    lower = ddim(ZERO_SNR, timesteps.explicit(ZERO_SNR, [999, 500]))
    assert np.all(np.isfinite(diffusion.sample(no_noise, {}, lower, key(), 2, (3,))))


def ideal_gaussian_at_zero_signal(prediction):
    """Looks its powers up, so that nothing is divided by the zero signal of T."""

    def apply_fn(params, x, t, cond=None):
        index = jnp.round(t).astype(int)
        a, n = (jnp.asarray(level)[index][:, None] for level in ZERO_SNR.at(np.arange(1001)))
        x0 = gaussian_denoiser(x, a, n, 0.4, 0.25)
        return x0 if prediction == "x0" else a * (x - a * x0) / n - n * x0

    return apply_fn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "epsilon"}, "'epsilon'; did you mean 'eps'"),
        ({"prediction": None}, "prediction is None; valid: edm, eps, flow, mean_flow, v, x0"),
        ({"clip": "recomput"}, "'recomput'; did you mean 'recompute'"),
        ({"clip": 2}, "clip is 2; valid"),
        ({"sample_ids": np.arange(4)}, r"sample_ids have shape \(4,\)"),
        ({"sample_ids": np.zeros((3, 1), int)}, "sample_ids have shape"),
        ({"x_init": np.zeros((3, 3))}, r"x_init has shape \(3, 3\)"),
        ({"x_init": np.zeros((2, 2))}, r"x_init has shape \(2, 2\)"),
        ({"cond": np.zeros(2)}, "cond"),
        ({"cond": {"label": np.zeros((1, 2))}}, "cond"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_a_remedy(options, message):
    with refused(message):
        diffusion.sample(no_noise, {}, uniform_table(2), key(), 3, (2,), **options)


@pytest.mark.parametrize("shape", [(3, 1), (1, 2), (), (3, 6)], ids=str)
def test_a_network_whose_output_is_not_shaped_as_its_input_is_refused(shape):
    """Broadcast in silence, it would give samples that look right."""
    with refused("shape"):
        diffusion.sample(lambda p, x, t, c: jnp.zeros(shape), {}, uniform_table(2), key(), 3, (2,))


def test_the_memory_of_a_run_does_not_grow_with_its_steps():
    def temporary_bytes(steps, return_trajectory=False):
        def run(key):
            table = uniform_table(steps)
            return diffusion.sample(no_noise, {}, table, key, 4, (4, 4, 3), return_trajectory=return_trajectory)

        memory = jax.jit(run).lower(key()).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    image_bytes = 4 * 4 * 4 * 3 * 4
    assert temporary_bytes(100) - temporary_bytes(10) < image_bytes
    assert temporary_bytes(100, return_trajectory=True) > 100 * image_bytes  # the measure does see growth
