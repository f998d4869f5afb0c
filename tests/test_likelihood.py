"""Laws of the likelihood under the probability flow, on Gaussian data, whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import MEANS, VARIANCES, WEIGHTS, refused
from scipy.stats import norm
from tiny import make_model

from diffusion import schedules, testbeds, timesteps
from diffusion.data import Dataset
from diffusion.evaluation.bound import variational_bound
from diffusion.evaluation.likelihood import bits_table, log_likelihood
from diffusion.model import Trained

T = 1000
LINEAR, COSINE = schedules.linear(), schedules.cosine()
SCHEDULES = {"linear": LINEAR, "cosine": COSINE}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
MEAN = 0.2
COVARIANCES = {"isotropic": np.full(4, 0.25), "narrow": np.full(4, 0.01), "diagonal": np.array([0.5, 0.1, 0.04, 0.01])}
every_covariance = pytest.mark.parametrize("variance", COVARIANCES.values(), ids=COVARIANCES.keys())
KEY = jax.random.key(5)


def draw(variance, count=256, seed=0):
    return MEAN + np.sqrt(variance) * np.random.default_rng(seed).standard_normal((count, variance.size))


def density_bits(x, mean, variance):
    """-log2 of a diagonal Gaussian's density, per dimension."""
    return np.mean(0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)), axis=-1) / np.log(2)


def model_bits(schedule, x, variance, t_min):
    """The same of the flow's own samples, which start at N(0, a^2 + n^2), not at the data's marginal, and end at t_min.

    The flow is affine, so two points tell its mean and std in x / a at t_min.
    """
    signal = schedule.at(t_min)[0]
    start = np.stack([np.zeros(variance.size), np.full(variance.size, np.hypot(*schedule.at(T)))])
    low, high = testbeds.gaussian_flow(schedule, MEAN, variance, start, T, t_min) / signal
    return density_bits(x, low, (high - low) ** 2)


@every_covariance
@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_density_of_gaussian_data_is_the_closed_form(schedule, variance):
    """Per sample that of the model, whose start is N(0, I); in the mean, to 1e-3 bits, that of the data."""
    x, testbed = draw(variance), testbeds.gaussian(schedule, MEAN, variance)
    for t_min in (1.0, 1e-3):
        got = log_likelihood(*testbed, schedule, x, t_min=t_min)
        np.testing.assert_allclose(got.bits, model_bits(schedule, x, variance, t_min), atol=1e-4)
        np.testing.assert_allclose(got.log_density, -got.bits * np.log(2) * variance.size)
        assert abs(np.mean(got.bits - density_bits(x, MEAN, variance))) < 1e-3


@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_noise_left_at_t_min_blurs_narrow_data(schedule):
    """The formula of the docstring: to first order -log2 p changes by (1 - x^2 / v) (n / a)^2 / (2 v ln 2)."""
    variance, t_min = np.full(4, 0.01), 1.0
    x, testbed = draw(variance), testbeds.gaussian(schedule, MEAN, variance)
    blur = np.exp(-2 * schedule.half_log_snr(t_min)) / variance
    early, late = (log_likelihood(*testbed, schedule, x, t_min=t, steps=200).bits for t in (t_min, 1e-6))
    wanted = np.mean((1 - (x - MEAN) ** 2 / variance) * blur, axis=1) / (2 * np.log(2))
    np.testing.assert_allclose(early - late, wanted, atol=5 * blur.max() ** 2)
    assert np.abs(early - late).max() > 20 * 1e-4


@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_error_falls_with_the_fourth_power_of_the_steps(schedule):
    variance = COVARIANCES["diagonal"]
    x, testbed = draw(variance, 32), testbeds.gaussian(schedule, MEAN, variance)
    wanted = model_bits(schedule, x, variance, 1.0)
    steps = np.array([32, 64, 128])
    errors = [np.sqrt(np.mean((log_likelihood(*testbed, schedule, x, steps=s).bits - wanted) ** 2)) for s in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 3.5 < order < 5, (order, errors)


@pytest.mark.usefixtures("float64")
def test_the_density_of_a_mixture_is_the_closed_form():
    """Not affine: the flow splits three modes. The cosine schedule starts at the mixture's marginal to 1e-4."""
    testbed = testbeds.mixture(COSINE, WEIGHTS, np.reshape(MEANS, (3, 1)), VARIANCES)
    x = np.linspace(-1.2, 1.2, 41)[:, None]
    spread = np.sqrt(np.array(VARIANCES) + np.exp(-2 * COSINE.half_log_snr(1e-3)))
    wanted = np.log(norm.pdf(x, MEANS, spread) @ WEIGHTS)
    got = log_likelihood(*testbed, COSINE, x, steps=400, t_min=1e-3).log_density
    np.testing.assert_allclose(got, wanted, atol=2e-3)


@pytest.mark.usefixtures("float64")
def test_the_density_of_a_mixture_integrates_to_one():
    testbed = testbeds.mixture(LINEAR, WEIGHTS, np.reshape(MEANS, (3, 1)), VARIANCES)
    x = np.linspace(-2.5, 2.5, 1001)[:, None]
    density = np.exp(log_likelihood(*testbed, LINEAR, x, steps=400).log_density)
    assert abs(np.sum(density) * (x[1, 0] - x[0, 0]) - 1) < 1e-4


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
@pytest.mark.usefixtures("float64")
def test_hutchinson_is_unbiased_where_the_jacobian_is_not_diagonal(trace):
    """Points of a mixture in four dimensions; its Jacobian mixes pixels, so that single probes differ."""
    rng = np.random.default_rng(2)
    testbed = testbeds.mixture(LINEAR, [1, 2, 3], rng.normal(0, 0.5, (3, 4)), [0.05, 0.1, 0.2])
    x = np.tile(rng.normal(0, 0.5, (1, 4)), (1000, 1))
    exact = log_likelihood(*testbed, LINEAR, x[:1], steps=20).bits
    got = np.asarray(log_likelihood(*testbed, LINEAR, x, KEY, trace=trace, steps=20).bits)
    error = got.std(ddof=1) / len(got) ** 0.5
    assert 1e-5 < error < 0.2
    assert abs(got.mean() - exact[0]) < 4 * error
    averaged = np.asarray(log_likelihood(*testbed, LINEAR, x, KEY, trace=trace, steps=20, probes=4).bits)
    assert 0.35 < averaged.std() / got.std() < 0.65  # 1 / sqrt(4)


@pytest.mark.usefixtures("float64")
def test_one_rademacher_probe_is_exact_where_the_jacobian_is_diagonal():
    variance = COVARIANCES["diagonal"]
    x, testbed = draw(variance, 8), testbeds.gaussian(LINEAR, MEAN, variance)
    exact, estimated = (log_likelihood(*testbed, LINEAR, x, KEY, trace=t).bits for t in ("exact", "rademacher"))
    np.testing.assert_allclose(estimated, exact, rtol=1e-10)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@pytest.mark.usefixtures("float64")
def test_every_prediction_gives_the_same_density(prediction):
    variance = COVARIANCES["diagonal"]
    x = draw(variance, 8)
    eps = log_likelihood(*testbeds.gaussian(LINEAR, MEAN, variance), LINEAR, x).bits
    other = testbeds.gaussian(LINEAR, MEAN, variance, prediction)
    np.testing.assert_allclose(log_likelihood(*other, LINEAR, x, prediction=prediction).bits, eps, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_the_density_does_not_depend_on_the_scale_of_the_process():
    """x / a and n / a are all that matters, whether a^2 + n^2 is 1 or not."""
    variance = np.full(3, 0.25)
    x = draw(variance, 8)
    scaled = schedules.from_signal_noise(*(v * np.linspace(1, 0.3, T + 1) for v in LINEAR.at(range(T + 1))))
    for schedule in (schedules.edm(sigma_max=157.0), scaled):
        testbed = testbeds.gaussian(schedule, 0.2, variance)
        got = log_likelihood(*testbed, schedule, x, t_min=1e-2, steps=200).bits
        np.testing.assert_allclose(got, model_bits(schedule, x, variance, 1e-2), atol=1e-4)


def test_float32_is_right_to_a_thousandth_of_a_bit():
    variance = COVARIANCES["diagonal"]
    x, testbed = draw(variance), testbeds.gaussian(LINEAR, MEAN, variance)
    got = log_likelihood(*testbed, LINEAR, np.float32(x))
    assert got.bits.dtype == jnp.float32
    np.testing.assert_allclose(got.bits, model_bits(LINEAR, x, variance, 1.0), atol=1e-3)


def test_a_sample_draws_from_its_id_alone():
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1)).astype(np.uint8)
    testbed = testbeds.gaussian(LINEAR, 0.0, 0.25)
    options = {"trace": "gaussian", "dequantize": True, "steps": 10}
    together = log_likelihood(*testbed, LINEAR, images, KEY, **options).bits
    part = log_likelihood(*testbed, LINEAR, images[4:1:-1], KEY, sample_ids=jnp.array([4, 3, 2]), **options).bits
    np.testing.assert_allclose(part, together[4:1:-1], rtol=1e-5)
    assert np.ptp(together - part[0]) > 0


def gaussian_images(deviation, count=400):
    """8-bit images of independent Gaussian pixels, and -log2 of their probability per dimension."""
    values = 0.1 + deviation * np.random.default_rng(1).standard_normal((count, 3, 3, 1))
    images = np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)
    centres = images / 127.5 - 1
    bins = norm.cdf(centres + 1 / 255, 0.1, deviation) - norm.cdf(centres - 1 / 255, 0.1, deviation)
    return images, -np.log2(bins).reshape(count, -1).mean(axis=1)


@every_schedule
@pytest.mark.usefixtures("float64")
def test_dequantized_bits_are_those_of_the_bins(schedule):
    """Jensen's inequality loses (width / std)^2 / 24 nats of a pixel here, next to nothing for pixels so wide."""
    images, wanted = gaussian_images(0.25)
    testbed = testbeds.gaussian(schedule, 0.1, 0.25**2)
    got = np.asarray(log_likelihood(*testbed, schedule, images, KEY, dequantize=True).bits)
    error = (got - wanted).std(ddof=1) / len(got) ** 0.5
    assert abs((got - wanted).mean()) < 4 * error + 1e-4
    assert error < 1e-3


@every_schedule
@pytest.mark.usefixtures("float64")
def test_the_variational_bound_is_no_lower_than_the_likelihood_in_the_mean(schedule):
    """The bound is of 8-bit images, so the density's are dequantized, which costs next to nothing at this width.

    With an exact denoiser the flow's likelihood is that of the data, which no model's mean falls below (Gibbs). A
    variance of beta is the right one where a pixel of the data is much wider than the noise of a step: the gap closes.
    """
    images, _ = gaussian_images(0.25)
    testbed = testbeds.gaussian(schedule, 0.1, 0.25**2)
    exact = np.asarray(log_likelihood(*testbed, schedule, images, KEY, dequantize=True, steps=50).bits)
    gaps = {}
    for variance, steps in (("small", 10), ("small", 100), ("large", 10), ("large", 100), ("large", T)):
        tau, x_0 = timesteps.uniform(schedule, steps), jnp.asarray(images / 127.5 - 1)
        bound = variational_bound(*testbed, schedule, tau, x_0, KEY, clip="none", variance=variance)
        gap = np.asarray(bound.total) - exact
        assert gap.mean() > -3 * gap.std(ddof=1) / len(gap) ** 0.5
        gaps[variance, steps] = gap.mean()
    assert gaps["large", 10] > gaps["large", 100]
    assert gaps["large", T] < 0.1


def test_wrong_arguments_are_refused():
    testbed = testbeds.gaussian(LINEAR, 0.0, 0.25)
    x, images = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.uint8)
    for options, message in (
        ({"trace": "exakt"}, "did you mean 'exact'"),
        ({"trace": "gaussian"}, "give a key"),
        ({"probes": 0}, "probes"),
        ({"steps": 0.5}, "steps"),
        ({"t_min": 0}, "t_min"),
        ({"prediction": "score"}, "prediction"),
        ({"dequantize": True, "key": KEY}, "takes uint8"),
    ):
        with refused(message):
            log_likelihood(*testbed, LINEAR, x, **options)
    with refused("dequantize=True"):
        log_likelihood(*testbed, LINEAR, images)
    with refused("signal is zero"):
        log_likelihood(*testbed, schedules.zero_terminal_snr(LINEAR), x)


def test_the_table_of_a_run_holds_the_mean_likelihood_of_all_images_in_any_batches():
    def network(params, x, t, cond):
        return jnp.tanh(x) + cond[:, None, None, None] / 10

    images = np.random.default_rng(0).choice(256, (11, 2, 2, 1)).astype(np.uint8)
    labels = (np.arange(11) % 3).astype(np.int32)
    run = Trained(make_model(network, LINEAR, (2, 2, 1), "v", num_classes=3), {}, None, 0, "0.9")
    rows = bits_table(run, Dataset(images, labels, ("a", "b", "c")), KEY, steps=(3, 6), batch_size=4)
    assert [row.steps for row in rows] == [3, 6]
    for row in rows:
        options = {"prediction": "v", "trace": "rademacher", "steps": row.steps, "dequantize": True}
        bits = np.asarray(log_likelihood(network, {}, LINEAR, images, KEY, cond=jnp.asarray(labels), **options).bits)
        np.testing.assert_allclose(row.bits, bits.mean(), rtol=1e-5)
        np.testing.assert_allclose(row.standard_error, bits.std(ddof=1) / 11**0.5, rtol=1e-3)
