"""Laws of the variational bound: its terms against integrals, and the whole against the likelihood it bounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gaussian_denoiser, ideal_network, refused
from scipy import integrate
from scipy.special import log_ndtr
from scipy.stats import norm
from tiny import make_model

from diffusion import gaussian, schedules, timesteps
from diffusion.data import Dataset
from diffusion.evaluation import bound as bounds
from diffusion.evaluation.bound import bits_table, variational_bound
from diffusion.model import Trained
from diffusion.objectives.bound import BoundSteps, discretized_log_likelihood, step_bits
from diffusion.objectives.losses import Batch, vlb_loss
from diffusion.predictions import reading
from diffusion.solvers import ddpm

in_double = pytest.mark.usefixtures("float64")
T = 50
LINEAR = schedules.linear(T, 1e-3, 0.12)
EDM = schedules.edm(T)
FLOW = schedules.rectified_flow(T)
TAU = [T, 38, 21, 9, 2, 0]
VARIANCES = ("small", "large", "learned")
LEVELS = np.arange(256) / 127.5 - 1


def key(seed=0):
    return jax.random.key(seed)


def pixels(shape, seed=1):
    return np.random.default_rng(seed).choice(LEVELS, shape)


# The likelihood of 8-bit pixels


@in_double
@pytest.mark.parametrize("std", [1e-4, 0.003, 0.05, 0.4, 3.0, 100.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.3, 0.0021, 0.5, 1.0, 1.2])
def test_the_probabilities_of_all_256_values_add_up_to_one(mean, std):
    logs = discretized_log_likelihood(LEVELS, mean, 2 * np.log(std))
    assert np.all(np.isfinite(logs))
    np.testing.assert_allclose(np.sum(np.exp(logs)), 1, rtol=1e-11)


def log_bin(x, mean, std):
    """log of the integral of the density over the bin, relative to the density's height at the end nearest the mean."""
    low, high = (x - mean - 1 / 255) / std, (x - mean + 1 / 255) / std
    top = 0.0 if low < 0 < high else min(abs(low), abs(high))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    # The density falls by exp(-top) a unit: beyond 40 of these nothing is left.
    reach = min(high - low, 40 / max(top, 1.0))
    z = top + reach * (nodes + 1) / 2 if top else low + (high - low) * (nodes + 1) / 2
    scaled = np.exp((top - z) * (top + z) / 2)
    return -(top**2) / 2 + np.log(np.sum(weights * scaled) * (reach if top else high - low) / 2 / np.sqrt(2 * np.pi))


@in_double
def test_the_likelihood_of_a_pixel_is_the_integral_over_its_bin_also_far_out():
    """Up to hundreds of standard deviations, where the probability itself is 0 in double precision."""
    for mean in (-1.5, -0.4, 0.002, 0.9, 40.0):
        for std in (0.004, 0.02, 0.3, 5.0):
            got = discretized_log_likelihood(LEVELS[1:-1], mean, 2 * np.log(std))
            wanted = [log_bin(x, mean, std) for x in LEVELS[1:-1]]
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@in_double
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (30.0, 0.1), (-30.0, 0.1), (0.995, 0.002)])
def test_the_first_and_last_bin_have_no_outer_end(mean, std):
    first, final = discretized_log_likelihood(LEVELS[[0, -1]], mean, 2 * np.log(std))
    np.testing.assert_allclose(first, log_ndtr((-1 + 1 / 255 - mean) / std), rtol=1e-12)
    np.testing.assert_allclose(final, log_ndtr((mean - 1 + 1 / 255) / std), rtol=1e-12)


@pytest.mark.parametrize("std", [0.004, 0.05, 1.0])
def test_single_precision_gives_the_likelihood_of_double_precision_and_finite_gradients(std):
    x, mean = LEVELS.astype(np.float32), np.linspace(-3, 3, 256).astype(np.float32)[::-1]
    log_variance = np.full(256, 2 * np.log(std), np.float32)
    got = discretized_log_likelihood(x, mean, log_variance)
    grads = jax.grad(lambda *args: discretized_log_likelihood(x, *args).sum(), argnums=(0, 1))(mean, log_variance)
    assert all(np.all(np.isfinite(g)) for g in grads)
    with jax.enable_x64(True):
        double = [np.asarray(v, np.float64) for v in (x, mean, log_variance)]
        wanted = discretized_log_likelihood(*double)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-4)


# One step


def divergence(q, p):
    """KL of q from p, by quadrature."""
    low, high = q.mean() - 12 * q.std(), q.mean() + 12 * q.std()
    return integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), low, high, epsabs=1e-12)[0]


@in_double
@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.0 + 1e-9, 2.5])
def test_a_term_is_the_divergence_of_two_normal_densities(ratio):
    """Against the integral of q log(q/p), by quadrature, for the posterior of DDPM and a model of another variance."""
    t, s, x_t, x_0, x0_hat = 21, 9, 0.4, 0.3, -0.2
    (mean, variance), (other, _) = (
        gaussian.posterior(LINEAR, np.array([x_t]), np.array([x]), t, s) for x in (x_0, x0_hat)
    )
    wanted = divergence(norm(mean[0], variance**0.5), norm(other[0], (ratio * variance) ** 0.5))
    from_x0 = ddpm(LINEAR, [t, s, 0]).update[0, 0, 1]
    step = BoundSteps(None, from_x0, np.log(variance), None)
    got = step_bits(
        step, np.array([[x_0]]), np.array([[x0_hat]]), np.full((1, 1), np.log(ratio * variance)), last=False
    )
    np.testing.assert_allclose(got, wanted / np.log(2), rtol=1e-8)


@in_double
def test_the_prior_is_the_divergence_of_the_start_from_the_noise_of_sampling():
    """x at tau[0] is N(a x_0, n^2); sampling starts with variance a^2 + n^2. By quadrature, for each pixel value."""
    for schedule, start in ((LINEAR, 9), (LINEAR, T), (EDM, 30)):
        a, n = schedule.at(start)
        bound = variational_bound(constant, {}, schedule, [start, 0], LEVELS[::51, None], key(), prediction="x0")
        wanted = [divergence(norm(a * x, n), norm(0, np.hypot(a, n))) for x in LEVELS[::51]]
        np.testing.assert_allclose(bound.prior, np.array(wanted) / np.log(2), rtol=1e-6, atol=1e-10)


def constant(params, x, t, cond=None):
    """An x_0 network that does not look at its noise, and a share that depends on the time."""
    return jnp.broadcast_to(0.3 + (t / 200)[:, None], x.shape)


# The whole bound


def per_sample(t, x):
    return t.reshape((-1,) + (1,) * (x.ndim - 1))


def two_headed(params, x, t, cond=None):
    output = 0.8 * jnp.tanh(1.3 * x) + 0.3 * jnp.sin(per_sample(t, x)) + (0.0 if cond is None else per_sample(cond, x))
    return jnp.concatenate([1.3 * output, jnp.sin(3 * x)], axis=-1)


def bound_by_hand(schedule, tau, x_0, prediction, variance, clip, cond=None):
    """(terms, prior) in plain NumPy and SciPy, with the documented noise: sample id, then step."""
    before, terms = None, []
    for i, (t, s) in enumerate(itertools.pairwise(tau)):
        keys = [jax.random.fold_in(jax.random.fold_in(key(3), j), i) for j in range(len(x_0))]
        eps = np.stack([jax.random.normal(k, x_0.shape[1:], np.float64) for k in keys])
        (a, n), (abar_t, abar_s) = schedule.at(t), schedule.alpha_bar[[t, s]]
        alpha = abar_t / abar_s
        beta = schedule.noise_var[t] - alpha * schedule.noise_var[s]
        x_t = a * x_0 + n * eps
        r = reading(prediction, np.float64(t), a, n)
        output = np.asarray(two_headed({}, r.input_scale * x_t, np.full(len(x_0), r.time), cond))
        output, share = np.split(output, 2, axis=-1)
        x0_hat = r.from_x * x_t + r.from_output * output
        x0_hat = np.clip(x0_hat, -1, 1) if clip == "recompute" else x0_hat
        tilde = beta * schedule.noise_var[s] / schedule.noise_var[t]
        if s == 0:
            tilde = beta if before is None else before
        before = tilde
        f = (share + 1) / 2
        var = {"small": tilde, "large": beta, "learned": beta**f * tilde ** (1 - f)}[variance]
        std = np.broadcast_to(np.sqrt(var), x_0.shape)
        if s == 0:
            upper = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
            lower = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
            # In the lower tail, where SciPy keeps its digits.
            flip = np.where(x_0 > x0_hat, -1, 1)
            high = np.where(flip > 0, upper - x0_hat, x0_hat - lower) / std
            low = np.where(flip > 0, lower - x0_hat, x0_hat - upper) / std
            nats = -(norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high))))
        else:
            add = np.sqrt(abar_s) * beta / schedule.noise_var[t]
            nats = 0.5 * (tilde / var - 1 - np.log(tilde / var) + add**2 * (x_0 - x0_hat) ** 2 / var)
        terms.append(nats.reshape(len(x_0), -1).mean(axis=1) / np.log(2))
    a, n = schedule.at(tau[0])
    nats = 0.5 * (np.log((a**2 + n**2) / n**2) + (n**2 + (a * x_0) ** 2) / (a**2 + n**2) - 1)
    return np.array(terms), nats.reshape(len(x_0), -1).mean(axis=1) / np.log(2)


CASES = [
    *[(LINEAR, TAU, "eps", variance, "none") for variance in VARIANCES],
    *[(LINEAR, TAU, prediction, "learned", "none") for prediction in ("x0", "v", "flow", "edm")],
    *[(LINEAR, [T, 0], "eps", variance, "recompute") for variance in VARIANCES],
    *[(LINEAR, list(range(T, -1, -1)), "v", variance, "recompute") for variance in VARIANCES],
    (EDM, TAU, "edm", "small", "recompute"),
    (FLOW, TAU, "flow", "learned", "recompute"),
]


@in_double
@pytest.mark.parametrize(("schedule", "tau", "prediction", "variance", "clip"), CASES)
def test_the_bound_is_the_plain_sum_of_its_papers(schedule, tau, prediction, variance, clip):
    x_0, cond = pixels((4, 3, 2)), np.array([0.1, -0.4, 0.2, 0.0])
    options = {"prediction": prediction, "variance": variance, "clip": clip, "cond": cond}
    terms, prior = bound_by_hand(schedule, tau, x_0, **options)
    got = variational_bound(two_headed, {}, schedule, tau, x_0, key(3), **options)
    np.testing.assert_allclose(got.terms, terms, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(got.prior, prior, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(got.total, prior + terms.sum(axis=0), rtol=1e-7)


@pytest.mark.parametrize("variance", VARIANCES)
def test_single_precision_gives_the_bound_of_double_precision_over_1000_steps(variance):
    """With a network that does not look at its noise, which differs between the two."""
    schedule, x_0 = schedules.linear(), pixels((2, 16))

    def network(params, x, t, cond=None):
        wave = jnp.broadcast_to(jnp.sin(t / 100)[:, None], x.shape)
        return jnp.concatenate([0.3 * wave, wave], axis=-1)

    def bound(x_0):
        every = range(1000, -1, -1)
        return variational_bound(network, {}, schedule, every, x_0, key(), prediction="x0", variance=variance)

    single = bound(x_0.astype(np.float32))
    with jax.enable_x64(True):
        double = bound(x_0)
    assert single.total.dtype == np.float32
    np.testing.assert_allclose(single.terms, double.terms, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(single.total, double.total, rtol=1e-5)


@in_double
def test_the_bound_of_an_image_does_not_depend_on_the_batch_around_it():
    x_0 = pixels((5, 4, 2))
    whole = variational_bound(two_headed, {}, LINEAR, TAU, x_0, key())
    ids = np.array([3, 1])
    part = variational_bound(two_headed, {}, LINEAR, TAU, x_0[ids], key(), sample_ids=ids)
    np.testing.assert_allclose(part.terms, whole.terms[:, ids], rtol=1e-12)
    other = variational_bound(two_headed, {}, LINEAR, TAU, x_0, key(1))
    assert np.min(np.abs(other.terms - whole.terms)) > 0


def test_another_grid_of_the_same_length_or_fixed_variance_compiles_nothing():
    x_0 = pixels((2, 4, 2)).astype(np.float32)
    variational_bound(two_headed, {}, LINEAR, TAU, x_0, key())
    before = bounds._terms._cache_size()
    variational_bound(two_headed, {}, LINEAR, TAU, x_0, key(1), variance="large")
    variational_bound(two_headed, {}, LINEAR, [T, 40, 30, 20, 1, 0], x_0, key())
    variational_bound(two_headed, {}, schedules.linear(T, 1e-3, 0.2), TAU, x_0, key())
    assert bounds._terms._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "smal"}, "variance is 'smal'; did you mean 'small'"),
        ({"clip": "keep_eps"}, "clip is 'keep_eps'"),
        ({"prediction": "epsilon"}, "did you mean 'eps'"),
        ({"variance": "learned"}, "takes its variance from the network"),
        ({"schedule": FLOW}, "zero signal"),
    ],
)
def test_what_has_no_bound_is_refused(options, message):
    options = {"schedule": LINEAR, **options}
    with refused(message):
        variational_bound(
            lambda p, x, t, cond: x, {}, options.pop("schedule"), TAU, pixels((2, 3, 1)), key(), **options
        )


@pytest.mark.parametrize("x_0", [LEVELS / 2, LEVELS + 2 / 255, (LEVELS + 1) * 127.5], ids=["half", "beyond", "uint8"])
def test_images_that_are_not_of_8_bits_in_minus_one_to_one_are_refused(x_0):
    with refused("8-bit pixels"):
        variational_bound(two_headed, {}, LINEAR, TAU, x_0[:, None].astype(np.float32), key())


# Gaussian data, for which the ideal network, and so the likelihood of its sampler, are known

MEAN, VARIANCE = 0.1, 0.04
DENOISER = functools.partial(gaussian_denoiser, mean=MEAN, variance=VARIANCE)
IDEAL = ideal_network(LINEAR, DENOISER, "eps")


def best_log_variance(t, s):
    """Of p(x_s | x_t) for this data: that of the posterior and what x_0 adds, given x_t."""
    beta = LINEAR.noise_var[t] - LINEAR.alpha_bar[t] / LINEAR.alpha_bar[s] * LINEAR.noise_var[s]
    add = np.sqrt(LINEAR.alpha_bar[s]) * beta / LINEAR.noise_var[t]
    left = VARIANCE * LINEAR.noise_var[t] / (LINEAR.alpha_bar[t] * VARIANCE + LINEAR.noise_var[t])
    return np.log(beta * LINEAR.noise_var[s] / LINEAR.noise_var[t] + add**2 * left)


@functools.cache
def ideal_with_variance(tau, shift=0.0):
    """The ideal network with the share that gives the best variance, or the best log-variance moved by shift."""
    small, large = ddpm(LINEAR, tau, "learned").log_variance.T
    best = np.array([best_log_variance(t, s) for t, s in itertools.pairwise(tau)]) + shift
    shares = np.interp(np.arange(T + 1), tau[-2::-1], (2 * (best - small) / (large - small) - 1)[::-1])

    def network(params, x, t, cond=None):
        share = jnp.broadcast_to(per_sample(jnp.asarray(shares)[t.astype(int)], x), x.shape)
        return jnp.concatenate([IDEAL(params, x, t), share], axis=-1)

    return network


def log_variances(tau, variance):
    small, large = ddpm(LINEAR, tau, "learned").log_variance.T
    best = np.array([best_log_variance(t, s) for t, s in itertools.pairwise(tau)])
    return {"small": small, "large": large, "learned": best}[variance]


def model_bits(tau, variance):
    """-log2 p of each pixel value under the sampler: affine steps from N(0, 1) leave x Gaussian up to the last bin."""
    mean, var = 0.0, 1.0
    table, logs = ddpm(LINEAR, tau), log_variances(tau, variance)
    for i in range(table.nfe):
        offset = DENOISER(0.0, table.signal[i], table.noise[i])
        slope = DENOISER(1.0, table.signal[i], table.noise[i]) - offset
        keep, add, _ = table.update[i, 0]
        mean, var = (keep + add * slope) * mean + add * offset, (keep + add * slope) ** 2 * var + np.exp(logs[i])
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    z = (edges - mean) / np.sqrt(var)
    lower = np.where(z[1:] + z[:-1] > 0, -z[1:], z[:-1])
    upper = np.where(z[1:] + z[:-1] > 0, -z[:-1], z[1:])
    return -np.log(norm.cdf(upper) - norm.cdf(lower)) / np.log(2)


def data_probabilities():
    """Of the 256 values, for the Gaussian in bins."""
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    return np.diff(norm.cdf(edges, MEAN, VARIANCE**0.5))


@functools.cache
def bound_of_values(tau, variance, shift=0.0):
    """The bound of every pixel value, [256, 200]: by 200 noises; the same for every variance."""
    with jax.enable_x64(True):
        network = ideal_with_variance(tau, shift) if variance == "learned" else IDEAL
        x_0 = np.repeat(LEVELS, 200)[:, None]
        bound = variational_bound(network, {}, LINEAR, tau, x_0, key(5), variance=variance, clip="none")
        return np.asarray(bound.total).reshape(256, 200)


GRIDS = [(T, 0), tuple(TAU), tuple(range(T, -1, -1))]


# With one step there is nothing to learn: both ends are beta.
@pytest.mark.parametrize(
    ("tau", "variance"), [(g, v) for g in GRIDS for v in VARIANCES if len(g) > 2 or v != "learned"]
)
def test_the_bound_is_never_below_the_true_likelihood_of_the_sampler(tau, variance):
    """For each pixel value, by five standard errors of 200 noises."""
    totals = bound_of_values(tau, variance)
    error = totals.std(axis=1, ddof=1) / 200**0.5
    gap = totals.mean(axis=1) - model_bits(tau, variance)
    assert np.all(gap > -5 * error - 1e-9)
    assert data_probabilities() @ gap > 0


def expected(tau, variance, shift=0.0):
    """Mean bound of the data: bits per pixel."""
    return data_probabilities() @ bound_of_values(tau, variance, shift).mean(axis=1)


def test_the_bound_falls_as_steps_grow():
    bits = [expected(tuple(timesteps.uniform(LINEAR, steps).tolist()), "large") for steps in (1, 2, 5, 10, 25, T)]
    assert np.all(np.diff(bits) < 0)
    assert entropy() < bits[-1] < entropy() + 0.2 < bits[0]


def entropy():
    """Of the data in bits: what no model can be below."""
    return -data_probabilities() @ np.log2(data_probabilities())


@pytest.mark.parametrize("steps", [2, 5, 25, T])
def test_with_the_best_variance_any_number_of_steps_reaches_the_entropy_of_gaussian_data(steps):
    """Its reverse steps are Gaussian, so nothing is lost; by five standard errors."""
    tau = tuple(timesteps.uniform(LINEAR, steps).tolist())
    totals, p = bound_of_values(tau, "learned"), data_probabilities()
    error = np.sqrt(np.sum(p**2 * totals.var(axis=1, ddof=1) / 200))
    assert error < 0.05
    assert abs(p @ totals.mean(axis=1) - entropy()) < 5 * error


@pytest.mark.parametrize("tau", GRIDS[1:], ids=len)
def test_the_best_learned_variance_beats_both_fixed_ones_and_its_neighbours(tau):
    best = expected(tau, "learned")
    assert best < min(expected(tau, "small"), expected(tau, "large"))
    assert best < min(expected(tau, "learned", shift) for shift in (-0.1, 0.1))


@in_double
def test_vlb_over_all_timesteps_is_the_sum_of_the_terms():
    """With a network that does not look at its noise the terms have none, and the identity is exact."""
    x_0, every = np.tile(pixels((1, 4, 2)), (T, 1, 1)), list(range(T, -1, -1))

    def network(params, x, t, cond=None):
        t = per_sample(t, x).astype(x.dtype)  # whole in training, and a sine of int32 is a float32
        share = jnp.broadcast_to(jnp.sin(t), x.shape)
        return jnp.concatenate([jnp.broadcast_to(0.3 * jnp.cos(t), x.shape), share], axis=-1)

    bound = variational_bound(
        network, {}, LINEAR, every, x_0[:1], key(), prediction="x0", variance="learned", clip="none"
    )
    keys = jax.random.split(key(1), T)
    bind = functools.partial(network, {})
    loss = vlb_loss(Batch(bind, x_0, None, keys, jnp.arange(T), T), LINEAR, "x0")
    np.testing.assert_allclose(loss.value[::-1] / T, bound.terms[:, 0], rtol=1e-8)
    np.testing.assert_allclose(loss.value.mean(), bound.terms.sum(), rtol=1e-8)


@in_double
def test_vlb_estimates_the_sum_of_the_terms():
    """With the ideal network, by five standard errors of both estimates."""
    every = tuple(range(T, -1, -1))
    network = ideal_with_variance(every)
    x_0 = np.tile(pixels((1, 8, 1)), (20 * T, 1, 1))
    bound = variational_bound(network, {}, LINEAR, every, x_0[:100], key(2), variance="learned", clip="none").terms.sum(
        axis=0
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key(9), i))(jnp.arange(20 * T))
    bind = functools.partial(network, {})
    losses = np.array(vlb_loss(Batch(bind, x_0, None, keys, jnp.arange(20 * T), 20 * T), LINEAR).value)
    # Stratified: 20 draws of each timestep.
    by_time = losses.reshape(T, 20)
    error = np.sqrt(np.sum(by_time.var(axis=1, ddof=1) / 20)) / T
    error = np.hypot(error, bound.std(ddof=1) / 10)
    assert error < 0.05 * bound.mean()
    assert abs(losses.mean() - bound.mean()) < 5 * error


# A trained run


def trained(num_classes=0, learned_variance=False):
    def network(params, x, t, cond=None):
        output = two_headed(params, x, t, None if cond is None else cond / 10)
        return output if learned_variance else output[..., : x.shape[-1]]

    return Trained(make_model(network, LINEAR, (4, 2, 1), "v", num_classes, learned_variance), {}, None, 0, "0.9")


@pytest.mark.parametrize(("num_classes", "learned_variance", "steps"), [(0, False, (3, 5)), (3, True, (5,))])
def test_the_table_of_a_run_holds_the_mean_bound_of_all_images_in_any_batches(num_classes, learned_variance, steps):
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 11).astype(np.int32)
    data = Dataset(rng.choice(256, (11, 4, 2, 1)).astype(np.uint8), labels, ("a", "b", "c"))
    run = trained(num_classes, learned_variance)
    rows = bits_table(run, data, key(), grids=[timesteps.uniform(LINEAR, s) for s in steps], batch_size=4)
    variances = VARIANCES if learned_variance else VARIANCES[:2]
    assert [(r.variance, r.steps) for r in rows] == [(v, s) for v in variances for s in steps]
    x_0 = data.images.astype(np.float32) / 127.5 - 1
    options = {"prediction": "v", "cond": jnp.asarray(labels) if num_classes else None}
    for row in rows:
        tau = timesteps.uniform(LINEAR, row.steps)
        args = (run.model.apply_fn, {}, LINEAR, tau, x_0, key())
        bound = variational_bound(*args, variance=row.variance, **options)
        total = np.asarray(bound.total)
        np.testing.assert_allclose(row.bits, total.mean(), rtol=1e-4)
        np.testing.assert_allclose(row.standard_error, total.std(ddof=1) / 11**0.5, rtol=1e-3)
        np.testing.assert_allclose(row.terms, np.asarray(bound.terms).mean(axis=1), rtol=1e-3)
        np.testing.assert_allclose(row.prior + sum(row.terms), row.bits, rtol=1e-5)
        assert row.times == tuple(tau[:-1])


def test_the_published_large_variance_is_large_with_the_last_step_of_small():
    x_0 = pixels((3, 4))
    network = ideal_network(LINEAR, lambda x, a, n: gaussian_denoiser(x, a, n, 0.1, 0.3))
    small, large, published = (
        variational_bound(network, {}, LINEAR, TAU, x_0, key(), prediction="x0", variance=variance)
        for variance in ("small", "large", "large_published")
    )
    np.testing.assert_array_equal(published.terms[:-1], large.terms[:-1])
    np.testing.assert_array_equal(published.terms[-1], small.terms[-1])
    assert np.all(published.terms[-1] != large.terms[-1])
    np.testing.assert_allclose(published.total, published.prior + published.terms.sum(axis=0), rtol=1e-6)
