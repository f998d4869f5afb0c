"""Laws of the denoiser: prediction types, guidance, clipping and thresholding, known pixels, learned variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import mixture_denoiser, refused

import diffusion
from diffusion import gaussian, sampling, schedules, timesteps
from diffusion.denoiser import log_variance_between
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS, ddim, ddpm, dpm_solver_pp, make_table, unipc

T = 50
LINEAR = schedules.linear(T, 1e-3, 0.12)
EDM = schedules.edm(T)
FLOW = schedules.rectified_flow(T)
in_double = pytest.mark.usefixtures("float64")


def key(seed=0):
    return jax.random.key(seed)


@functools.cache
def noise_of(seed, number, stage, shape):
    """The documented derivation: fold in the sample id, then the stage; stage 0 is the start. In double precision."""
    keys = [jax.random.fold_in(jax.random.fold_in(key(seed), i), stage) for i in range(number)]
    return np.stack([jax.random.normal(k, shape, np.float64) for k in keys])


def per_sample(values, x):
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


# Predictions of one ideal denoiser


def ideal(prediction):
    """The network that says, in its own way, what the mixture's denoiser says; params hold the levels of all t."""

    def eps_x0_v_or_flow(params, x, t, cond=None):
        a, n = (per_sample(params[level][t.astype(int)], x) for level in ("signal", "noise"))
        x0 = mixture_denoiser(x, a, n, jnp)
        eps = (x - a * x0) / n
        return {"eps": eps, "x0": x0, "v": a * eps - n * x0, "flow": eps - x0}[prediction]

    def edm(params, x, t, cond=None):
        """F = (D - c_skip y) / c_out with D of y = x / c_in at sigma = exp(4 c_noise) (EDM, Table 1)."""
        sigma, sigma_data = per_sample(jnp.exp(4 * t), x), 0.5
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / jnp.sqrt(sigma_data**2 + sigma**2)
        y = x * jnp.sqrt(sigma**2 + sigma_data**2)
        return (mixture_denoiser(y, 1.0, sigma, jnp) - c_skip * y) / c_out

    return edm if prediction == "edm" else eps_x0_v_or_flow


IDEAL = {p: ideal(p) for p in ("eps", "x0", "v", "flow", "edm")}


def ideal_samples(schedule, table, prediction):
    """Clipped with keep_eps, which uses the estimate both before and after clipping."""
    levels = dict(zip(("signal", "noise"), schedule.at(np.arange(T + 1)), strict=True))
    options = {"prediction": prediction, "clip": "keep_eps"}
    return diffusion.sample(IDEAL[prediction], levels, table, key(), 16, (3,), **options)


@in_double
@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm"])
def test_every_prediction_of_one_denoiser_gives_the_samples_of_eps(prediction):
    for schedule, top in ((LINEAR, T), (EDM, T), (FLOW, T - 1)):
        table = ddim(schedule, [top, 37, 20, 11, 4, 1, 0], 0.5)
        eps = ideal_samples(schedule, table, "eps")
        assert np.std(eps) > 0.3
        np.testing.assert_allclose(ideal_samples(schedule, table, prediction), eps, rtol=0, atol=1e-9)


@in_double
def test_x0_v_and_flow_predictions_agree_from_zero_signal_and_the_others_are_refused_there():
    table = ddim(FLOW, timesteps.uniform(FLOW, 6), 0.5)
    x0, v, flow = (ideal_samples(FLOW, table, p) for p in ("x0", "v", "flow"))
    np.testing.assert_allclose(v, x0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(flow, x0, rtol=0, atol=1e-9)
    for prediction in ("eps", "edm"):
        with refused("zero signal"):
            ideal_samples(FLOW, table, prediction)


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
def test_an_edm_network_sees_unit_variance_and_a_quarter_of_log_sigma(schedule):
    """c_in and c_noise of EDM, Table 1: for data of std 0.5 the input has variance 1 at every noise level."""
    seen = []

    def spy(params, x, t, cond=None):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t, ordered=True)
        return jnp.zeros_like(x)

    table = ddim(schedule, [T, 30, 10, 2, 0])
    options = {"prediction": "edm", "return_trajectory": True}
    _, path = diffusion.sample(spy, {}, table, key(), 2, (5,), **options)
    jax.effects_barrier()
    sigma = table.noise / table.signal
    assert len(seen) == table.nfe
    for i, (x, t) in enumerate(seen):
        np.testing.assert_allclose(t, np.log(sigma[i]) / 4, rtol=1e-5, atol=1e-7)
        std = np.sqrt(0.25 * table.signal[i] ** 2 + table.noise[i] ** 2)
        np.testing.assert_allclose(x, path.x[i] / std, rtol=1e-5)


# Guidance


def classed(params, x, t, cond):
    """A smooth elementwise network; cond moves and bends it."""
    cond = per_sample(cond, x)
    return jnp.tanh(params["slope"] * x + cond) * (0.4 + 0.1 * cond) + 0.3 * x - 0.2 * jnp.sin(per_sample(t, x))


SLOPE = {"slope": np.array(0.7)}
COND, NULL = np.array([1.0, -0.6, 2.0]), np.array([0.1, 0.1, -0.2])
TAU = [T, 38, 21, 9, 2, 0]


def guided(table, scale, network=classed, **options):
    options = {"cond": COND, "null_cond": NULL, **options}
    return np.asarray(diffusion.sample(network, SLOPE, table, key(), 3, (2, 4), guidance_scale=scale, **options))


compiled = jax.jit(classed)


def by_hand(scale, eta=0.0, prediction="eps", interval=(0, T), rescale=0.0, rule="cfg", clip="none", quantile=None):
    """DDIM over TAU with guidance, one plain step after the other."""
    tau, (a, n), x = TAU, LINEAR.at(TAU), noise_of(0, 3, 0, (2, 4))
    axes = tuple(range(1, x.ndim))

    def estimates(output, x, i):
        if prediction == "eps":
            return (x - n[i] * output) / a[i], output
        return output, (x - a[i] * output) / n[i]

    for i in range(len(tau) - 1):
        t = np.full(3, tau[i], np.float64)
        conditional, null = (np.asarray(compiled(SLOPE, x, t, c)) for c in (COND, NULL))
        output = conditional
        inside = interval[0] <= tau[i] <= interval[1]
        if inside:
            output = null + scale * (conditional - null)
            spread = conditional.std(axis=axes, keepdims=True) / output.std(axis=axes, keepdims=True)
            output = rescale * spread * output + (1 - rescale) * output
        x0, eps = estimates(output, x, i)
        if quantile is not None:
            limit = np.quantile(np.abs(x0).reshape(3, -1), quantile, axis=1).reshape(3, 1, 1)
            x0 = np.clip(x0, -np.maximum(limit, 1), np.maximum(limit, 1)) / np.maximum(limit, 1)
        elif clip != "none":
            x0 = np.clip(x0, -1, 1)
        if clip != "keep_eps":
            eps = (x - a[i] * x0) / n[i]
        if rule == "cfg++" and inside:
            eps = estimates(null, x, i)[1]
        sigma = eta * n[i + 1] / n[i] * np.sqrt(1 - a[i] ** 2 / a[i + 1] ** 2)
        x = a[i + 1] * x0 + np.sqrt(n[i + 1] ** 2 - sigma**2) * eps + sigma * noise_of(0, 3, i + 1, (2, 4))
    return x


@in_double
@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.5},
        {"prediction": "x0"},
        {"interval": (9, 21)},
        {"rescale": 0.7},
        {"rescale": 1.0, "interval": (21, T), "clip": "recompute", "eta": 1.0},
        {"clip": "recompute"},
        {"clip": "keep_eps"},
        {"quantile": 0.8},
        {"quantile": 0.8, "clip": "keep_eps", "prediction": "x0", "rescale": 0.5},
        {"rule": "cfg++"},
        {"rule": "cfg++", "prediction": "x0", "eta": 0.5},
        {"rule": "cfg++", "clip": "keep_eps", "quantile": 0.8},
        {"rule": "cfg++", "rescale": 0.7},
        {"rule": "cfg++", "interval": (9, 21)},
    ],
    ids=str,
)
def test_guided_sampling_is_the_plain_loop_of_its_papers(options):
    wanted = by_hand(1.7, **options)
    names = {"interval": "guidance_interval", "rescale": "guidance_rescale", "rule": "guidance_rule"}
    given = {names.get(k, {"quantile": "dynamic_threshold"}.get(k, k)): v for k, v in options.items() if k != "eta"}
    got = guided(ddim(LINEAR, TAU, options.get("eta", 0.0)), 1.7, **given)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    plain = by_hand(1.7, **{k: v for k, v in options.items() if k in ("eta", "prediction")})
    assert set(options) <= {"eta", "prediction"} or np.max(np.abs(wanted - plain)) > 1e-3


@in_double
def test_clipping_and_thresholding_bite_in_the_loop_they_are_compared_with():
    """Guards the test above: |x_0| exceeds 1 often, and is not cut everywhere."""
    plain = np.abs(by_hand(1.7))
    assert 0.05 < np.mean(plain > 1) < 0.95


@in_double
def test_a_scale_of_one_is_the_unguided_model_on_n_rows():
    shapes = []

    def spy(params, x, t, cond):
        shapes.append((x.shape, t.shape, cond.shape))
        return classed(params, x, t, cond)

    table = ddim(LINEAR, TAU, 0.5)
    one = guided(table, 1.0, spy)
    assert set(shapes) == {((3, 2, 4), (3,), (3,))}
    unguided = diffusion.sample(spy, SLOPE, table, key(), 3, (2, 4), cond=COND)
    np.testing.assert_array_equal(one, unguided)
    np.testing.assert_allclose(guided(table, np.array(1.0)), one, rtol=1e-12, atol=1e-12)  # the same, if computed


@in_double
def test_a_scale_of_zero_is_the_null_model():
    table = ddim(LINEAR, TAU, 0.5)
    null = diffusion.sample(classed, SLOPE, table, key(), 3, (2, 4), cond=NULL)
    np.testing.assert_allclose(guided(table, 0.0), null, rtol=1e-12, atol=1e-12)


@in_double
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "edm"])
def test_one_guided_step_is_linear_in_the_scale(prediction):
    table = ddim(LINEAR, [T, 0])
    zero, one, *others = (guided(table, w, prediction=prediction) for w in (0.0, 1.0, -1.0, 0.5, 4.0))
    assert np.min(np.abs(one - zero)) > 1e-6
    for w, got in zip((-1.0, 0.5, 4.0), others, strict=True):
        np.testing.assert_allclose(got, zero + w * (one - zero), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [lambda: ddim(LINEAR, TAU, 1.0), lambda: unipc(LINEAR, TAU)], ids=["ddim", "unipc"])
def test_guidance_makes_one_call_of_two_n_rows_a_stage(build):
    seen = []

    def spy(params, x, t, cond):
        def note(*rows):
            seen.append([np.asarray(r) for r in rows])

        jax.debug.callback(note, x, t, cond, ordered=True)
        return classed(params, x, t, cond)

    table = build()
    guided(table, 2.5, spy)
    jax.effects_barrier()
    assert len(seen) == table.nfe
    for t_stage, (x, t, cond) in zip(table.t, seen, strict=True):
        assert x.shape == (6, 2, 4)
        np.testing.assert_array_equal(x[:3], x[3:])
        np.testing.assert_array_equal(t, t_stage)
        np.testing.assert_array_equal(cond, np.concatenate([COND, NULL]).astype(np.float32))


def test_another_scale_interval_or_rescale_compiles_nothing():
    table, traces = ddim(LINEAR, TAU), []

    def spy(params, x, t, cond):
        traces.append(x.shape)
        return classed(params, x, t, cond)

    guided(table, 2.0, spy)
    before = sampling._run._cache_size(), len(traces)
    guided(table, 3.0, spy)
    guided(table, 3, spy)
    guided(table, 2.0, spy, guidance_interval=(5.0, 30.0))
    guided(table, -0.5, spy, guidance_rescale=0.7)
    assert (sampling._run._cache_size(), len(traces)) == before


@in_double
def test_full_rescale_gives_the_guided_output_the_spread_of_the_conditional_one():
    """With an x_0 network and one step the sample is the guided output itself."""
    table = ddim(LINEAR, [T, 0])
    conditional = guided(table, 1.0, prediction="x0")
    plain, full, half = (guided(table, 5.0, prediction="x0", guidance_rescale=r) for r in (0.0, 1.0, 0.5))
    wanted = conditional.std(axis=(1, 2))
    np.testing.assert_allclose(full.std(axis=(1, 2)), wanted, rtol=1e-10)
    assert np.all(np.abs(plain.std(axis=(1, 2)) / wanted - 1) > 0.005)
    np.testing.assert_allclose(half, (full + plain) / 2, rtol=1e-10)
    correlation = [np.corrcoef(f.ravel(), p.ravel())[0, 1] for f, p in zip(full, plain, strict=True)]
    np.testing.assert_allclose(correlation, 1, rtol=1e-10)  # scaled, not moved


@in_double
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_is_its_papers_algorithm_over_the_papers_range_of_scales(scale):
    """lambda in 0..1 (arXiv:2406.08070, Algorithm 2); at 1 D is conditional, but the eps is still the null one."""
    got = guided(ddim(LINEAR, TAU), scale, guidance_rule="cfg++")
    np.testing.assert_allclose(got, by_hand(scale, rule="cfg++"), rtol=1e-9, atol=1e-9)


def constant(params, x, t, cond):
    return jnp.broadcast_to(per_sample(cond, x), x.shape)


@in_double
@pytest.mark.parametrize(
    "build",
    [
        lambda: ddim(LINEAR, TAU),
        lambda: dpm_solver_pp(LINEAR, TAU, 3),
        lambda: unipc(LINEAR, TAU, 3),
    ],
    ids=["ddim", "dpm_solver_pp", "unipc"],
)
@pytest.mark.parametrize("option", ["cfg++", "keep_eps"])
def test_solvers_in_x_0_go_on_with_the_eps_they_are_told_to(option, build):
    """Estimates that do not depend on x make all these solvers exact: x_s = a_s D + n_s eps, eps not that of D."""
    table, x_init = build(), noise_of(0, 3, 0, (2, 4))
    options = {"prediction": "x0", "cond": COND, "x_init": x_init, "return_trajectory": True}
    if option == "cfg++":
        options |= {"guidance_rule": "cfg++", "guidance_scale": 1.7, "null_cond": NULL}
        x0, for_eps = NULL + 1.7 * (COND - NULL), NULL
    else:
        options |= {"clip": "keep_eps"}
        x0, for_eps = np.clip(COND, -1, 1), COND
    x0, for_eps = (v[:, None, None] for v in (x0, for_eps))
    _, path = diffusion.sample(constant, {}, table, key(), 3, (2, 4), **options)
    (a, n), x = LINEAR.at(TAU), x_init
    for i in range(5):
        x = a[i + 1] * x0 + n[i + 1] * (x - a[i] * for_eps) / n[i]
        np.testing.assert_allclose(path.x[i + 1], x, rtol=1e-9, atol=1e-9)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond": COND, "null_cond": None}, "null_cond"),
        ({"cond": None, "null_cond": NULL}, "cond"),
        ({"cond": None, "null_cond": None}, "cond"),
        ({"null_cond": NULL[:2]}, "null_cond"),
        ({"null_cond": {"label": NULL}}, "null_cond"),
        ({"cond": COND[:2], "null_cond": NULL[:2]}, "leading axis must be 3"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"guidance_rescale": -0.1}, "guidance_rescale"),
        ({"guidance_rescale": np.nan}, "guidance_rescale"),
        ({"guidance_interval": (30, 10)}, "guidance_interval"),
        ({"guidance_interval": (np.nan, 10)}, "guidance_interval"),
        ({"guidance_rule": "cfg+"}, r"'cfg\+'; did you mean"),
        ({"dynamic_threshold": 0.0}, "dynamic_threshold"),
        ({"dynamic_threshold": 1.1}, "dynamic_threshold"),
        ({"dynamic_threshold": np.nan}, "dynamic_threshold"),
        ({"known": (np.zeros((5,)), np.ones((5,)))}, "known"),
        ({"known": (np.zeros((3, 2, 4)), np.ones((2, 2, 4)))}, "known"),
        ({"known": np.zeros((3, 2, 4))}, "known"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with refused(message):
        guided(ddim(LINEAR, TAU), 2.0, **options)


# Dynamic thresholding


@in_double
@pytest.mark.parametrize("quantile", [0.5, 0.995])
def test_dynamic_thresholding_is_that_of_imagen(quantile):
    """Samples all of whose pixels lie in [-1, 1] stay; others are cut at their own quantile and scaled back."""
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((3, 5, 4)) * np.array([0.2, 1.0, 4.0])[:, None, None]

    def network(params, x, t, cond=None):
        return params

    got = diffusion.sample(
        network, x0, ddim(LINEAR, [T, 0]), key(), 3, (5, 4), prediction="x0", dynamic_threshold=quantile
    )
    for sample, given in zip(got, x0, strict=True):
        s = max(np.quantile(np.abs(given), quantile), 1.0)
        np.testing.assert_allclose(sample, np.clip(given, -s, s) / s, rtol=1e-12)
    np.testing.assert_allclose(got[0], x0[0], rtol=1e-12)
    assert np.max(np.abs(got)) <= 1


# Known pixels


def elementwise(params, x, t, cond=None):
    return 0.8 * jnp.tanh(1.3 * x) + 0.1 * jnp.sin(per_sample(t, x))


MASK = (np.random.default_rng(3).uniform(size=(4, 3, 2)) < 0.4).astype(np.float64)
VALUES = np.random.default_rng(4).uniform(-1.5, 1.5, (3, 4, 3, 2))
INPAINTERS = ("ddim", "dpm_solver_pp", "dpm_solver_pp_singlestep", "unipc", "deis", "plms", "heun")


def inpainted(table, **options):
    options = {"known": (VALUES, MASK), "return_trajectory": True, "prediction": "x0", **options}
    return diffusion.sample(elementwise, {}, table, key(), 3, (4, 3, 2), **options)


@in_double
@pytest.mark.parametrize("name", INPAINTERS)
def test_known_pixels_keep_one_eps_all_the_way_and_the_others_are_not_touched(name):
    table = SOLVERS[name](LINEAR, TAU)
    got, path = inpainted(table)
    known = np.broadcast_to(MASK, VALUES.shape) == 1
    eps = (np.asarray(path.x[0]) - table.signal[0] * VALUES) / table.noise[0]
    for a, n, x in zip(table.signal, table.noise, path.x, strict=False):
        np.testing.assert_allclose(x[known], (a * VALUES + n * eps)[known], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(path.x0[:, known], np.broadcast_to(VALUES[known], (table.nfe, known.sum())))
    # A last step of full order, as that of plms, adds differences of eps, which are 0 up to rounding.
    np.testing.assert_allclose(got[known], VALUES[known], rtol=0, atol=1e-10 if name == "plms" else 0)
    free, _ = inpainted(table, known=(VALUES, 0 * MASK))
    np.testing.assert_allclose(got[~known], free[~known], rtol=0, atol=1e-12)
    assert np.min(np.abs(got[known] - free[known])) > 1e-6


@in_double
def test_a_mask_of_zeros_keeps_nothing():
    table = ddim(LINEAR, TAU)
    none, zeros = (inpainted(table, known=known)[0] for known in (None, (VALUES, 0 * MASK)))
    np.testing.assert_allclose(zeros, none, rtol=0, atol=1e-12)


@in_double
def test_known_pixels_come_out_as_given_even_where_estimates_are_clipped():
    got, path = inpainted(ddim(LINEAR, TAU), clip="keep_eps")
    known = np.broadcast_to(MASK, VALUES.shape) == 1
    assert np.max(np.abs(VALUES[known])) > 1
    np.testing.assert_array_equal(got[known], VALUES[known])
    assert np.max(np.abs(path.x0[:, ~known])) <= 1


@in_double
def test_known_pixels_keep_their_eps_under_the_rule_that_goes_on_with_another():
    known = np.broadcast_to(MASK, VALUES.shape) == 1
    table = ddim(LINEAR, TAU)
    options = {"cond": COND, "null_cond": NULL, "guidance_scale": 2.0, "guidance_rule": "cfg++"}
    options |= {"known": (VALUES, MASK), "return_trajectory": True}
    got, path = diffusion.sample(classed, SLOPE, table, key(), 3, (4, 3, 2), **options)
    np.testing.assert_array_equal(got[known], VALUES[known])
    a, n = (level.reshape(-1, 1, 1, 1, 1) for level in (table.signal, table.noise))
    eps = (np.asarray(path.x[:-1]) - a * VALUES) / n
    np.testing.assert_allclose(eps[:, known], np.tile(eps[0][known], (table.nfe, 1)), rtol=0, atol=1e-10)


def test_known_pixels_of_a_stochastic_run_hold_noise_of_the_right_strength():
    """The values plus noise of mean 0 and variance n_t^2 at every stage; five standard errors of 2^15 pixels."""
    schedule = schedules.linear()
    table = ddim(schedule, timesteps.uniform(schedule, 4), 1.0)
    shape = (2**15,)
    options = {"prediction": "x0", "known": (0.6, 1), "return_trajectory": True}
    got, path = diffusion.sample(elementwise, {}, table, key(5), 1, shape, **options)
    np.testing.assert_array_equal(got, np.float32(0.6))
    for a, n, x in zip(table.signal, table.noise, np.asarray(path.x, np.float64), strict=False):
        eps = (x - a * 0.6) / n
        assert abs(eps.mean()) < 5 / shape[0] ** 0.5 + 0.01  # at the start a_t / n_t of the mean is left, 0.004
        assert abs(eps.var() - 1) < 5 * (2 / shape[0]) ** 0.5


@in_double
def test_known_values_and_mask_broadcast_over_samples_and_channels():
    table = ddim(LINEAR, TAU)
    values, mask = VALUES[:1], MASK[..., :1]
    small, _ = inpainted(table, known=(values, mask > 0))
    full = (np.broadcast_to(values, VALUES.shape), np.broadcast_to(mask, MASK.shape))
    np.testing.assert_array_equal(small, inpainted(table, known=full)[0])


# Learned variance


def two_headed(params, x, t, cond=None):
    """Estimates, then where between the logs of two variances each pixel's lies."""
    shift = 0.0 if cond is None else per_sample(cond, x)
    return jnp.concatenate([elementwise(params, x, t) + 0.1 * shift, jnp.sin(3 * x + shift)], axis=-1)


def learned_by_hand(table, seed, number, shape):
    x = noise_of(seed, number, 0, shape) * np.hypot(table.signal[0], table.noise[0])
    registers = np.stack([x] + [np.zeros_like(x)] * (table.num_registers - 1))
    for i in range(table.nfe):
        output = np.asarray(two_headed({}, registers[0], np.full(number, table.t[i])))
        x0, share = output[..., : shape[-1]], (output[..., shape[-1] :] + 1) / 2
        low, high = table.log_variance[i]
        z = np.exp(0.5 * (share * high + (1 - share) * low)) * noise_of(seed, number, i + 1, shape)
        registers = np.tensordot(table.update[i], np.stack([*registers, x0, z]), axes=1)
    return registers[0]


def random_learned_table(registers, stages=4):
    rng = np.random.default_rng(registers)
    angle = rng.uniform(0.2, 1.4, stages)
    update = rng.normal(0, 0.5, (stages, registers, registers + 2))
    times, log_variance = np.arange(stages, -1, -1), rng.normal(-1, 1, (stages, 2))
    return make_table("learned", times, times[:-1], np.cos(angle), np.sin(angle), update, log_variance)


@in_double
@pytest.mark.parametrize("table", [random_learned_table(3), ddpm(LINEAR, TAU, "learned")], ids=lambda t: t.name)
def test_a_learned_variance_scales_the_noise_of_each_pixel_between_the_logs_of_two(table):
    got = diffusion.sample(two_headed, {}, table, key(7), 3, (4, 2), prediction="x0")
    np.testing.assert_allclose(got, learned_by_hand(table, 7, 3, (4, 2)), rtol=1e-9, atol=1e-9)


@in_double
@pytest.mark.parametrize("tau", [[T, 0], TAU, list(range(T, -1, -1))], ids=len)
def test_learned_ddpm_holds_the_logs_of_the_posterior_and_forward_variances(tau):
    table, tau = ddpm(LINEAR, tau, "learned"), np.array(tau)
    zeros = np.zeros(len(tau) - 1)
    small = np.array(gaussian.posterior(LINEAR, zeros, zeros, tau[:-1], tau[1:])[1])
    large = 1 - LINEAR.alpha_bar[tau[:-1]] / LINEAR.alpha_bar[tau[1:]]
    small[-1] = small[-2] if len(small) > 1 else large[-1]
    np.testing.assert_allclose(table.log_variance, np.log([small, large]).T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(table.update[..., :2], ddpm(LINEAR, tau).update[..., :2], rtol=1e-14)
    np.testing.assert_array_equal(table.update[:, 0, 2], np.append(np.ones(len(tau) - 2), 0))


@in_double
@pytest.mark.parametrize(("share", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(share, variance):
    def network(params, x, t, cond=None):
        return jnp.concatenate([elementwise(params, x, t), jnp.full_like(x, params)], axis=-1)

    learned = diffusion.sample(network, share, ddpm(LINEAR, TAU, "learned"), key(), 3, (4, 2), prediction="x0")
    fixed = diffusion.sample(elementwise, {}, ddpm(LINEAR, TAU, variance), key(), 3, (4, 2), prediction="x0")
    np.testing.assert_allclose(learned, fixed, rtol=1e-9, atol=1e-9)


@in_double
def test_guidance_takes_the_variance_of_the_conditional_half():
    """After one noisy step the part of the sample that z makes has the conditional std."""
    update = np.array([[[0.0, 0.0, 1.0]]])
    table = make_table("noise", [1, 0], [1], [0.6], [0.8], update, [[-1.0, 0.5]])
    x_init = noise_of(1, 3, 0, (4, 2))
    options = {"prediction": "x0", "cond": COND, "null_cond": NULL, "guidance_scale": 3.0, "x_init": x_init}
    got = diffusion.sample(two_headed, {}, table, key(), 3, (4, 2), **options)
    share = (np.sin(3 * x_init + COND[:, None, None]) + 1) / 2
    wanted = np.exp(0.5 * (0.5 * share - (1 - share))) * noise_of(0, 3, 1, (4, 2))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def one_headed(params, x, t, cond=None):
    return two_headed(params, x, t, cond)[..., : x.shape[-1]]


EPS_ESTIMATED = {"analytic_dpm": {"gamma": np.full(5, 0.9)}}


@in_double
@pytest.mark.parametrize("name", [*SOLVERS, *ESTIMATED_SOLVERS])
def test_a_network_that_also_predicts_its_variance_runs_every_table(name):
    """The samples are those of its first half, guided too, where the table has its own variance."""
    table = (SOLVERS | ESTIMATED_SOLVERS)[name](LINEAR, TAU, **EPS_ESTIMATED.get(name, {}))
    for options in ({}, {"cond": COND, "null_cond": NULL, "guidance_scale": 1.7}):
        both, alone = (diffusion.sample(f, {}, table, key(), 3, (4, 2), **options) for f in (two_headed, one_headed))
        np.testing.assert_allclose(both, alone, rtol=1e-12, atol=1e-12)


def test_a_table_with_learned_variance_refuses_a_network_without():
    table = ddpm(LINEAR, TAU, "learned")
    with refused("takes its variance from the network"):
        diffusion.sample(one_headed, {}, table, key(), 3, (4, 2))
    with refused("ddpm.*learned.* takes its variance from the model.*ddpm:variance=small"):
        sampling.check_variance(table, learned_variance=False)
    sampling.check_variance(table, learned_variance=True)
    for learned_variance in (False, True):
        sampling.check_variance(ddpm(LINEAR, TAU), learned_variance)


def test_channels_that_are_neither_those_of_x_nor_twice_as_many_are_refused():
    def three(params, x, t, cond=None):
        return jnp.concatenate([x, x, x], axis=-1)

    for variance in ("small", "learned"):
        with refused("shape"):
            diffusion.sample(three, {}, ddpm(LINEAR, TAU, variance), key(), 3, (4, 2))


@pytest.mark.parametrize(("share", "end"), [(-1, 0), (1, 1)])
def test_a_share_of_minus_one_is_the_small_log_variance_and_of_one_the_large(share, end):
    logs = ddpm(LINEAR, TAU, "learned").log_variance.T
    np.testing.assert_array_equal(log_variance_between(share, *logs), logs[end])
    np.testing.assert_allclose(log_variance_between(0.0, *logs), logs.mean(axis=0), rtol=1e-15)
