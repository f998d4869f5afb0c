"""Laws of the weights of timesteps: what they are multiples of, their limits, and that they are finite."""

import numpy as np
import pytest
from reference import refused

from diffusion import schedules
from diffusion.objectives.weightings import WEIGHTINGS, loss_weights
from diffusion.predictions import PREDICTIONS, error_ratio

LINEAR = schedules.linear()
SCHEDULES = {
    "linear": LINEAR,
    "short": schedules.linear(1),
    "cosine": schedules.cosine(),
    "scaled_linear": schedules.scaled_linear(),
    "shifted_cosine": schedules.shifted_cosine(1000, 256),
    "edm": schedules.edm(),
    "rectified_flow": schedules.rectified_flow(),
    "zero_terminal": schedules.zero_terminal_snr(LINEAR),
}


def snr(schedule):
    return schedule.alpha_bar[1:] / schedule.noise_var[1:]


def on_x0(schedule, name, **options):
    return loss_weights(schedule, "x0", name, **options)[1:]


def test_simple_is_one_whatever_is_predicted():
    for prediction in PREDICTIONS:
        np.testing.assert_array_equal(loss_weights(LINEAR, prediction, "simple"), np.ones(1001))


@pytest.mark.parametrize("name", ["linear", "cosine", "edm"])
def test_snr_on_eps_is_simple(name):
    np.testing.assert_allclose(loss_weights(SCHEDULES[name], "eps", "snr")[1:], 1, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("min_snr", {"gamma": np.inf}), ("p2", {"gamma": 0.0}), ("edm", {"sigma_data": np.inf})],
)
def test_the_limits_of_the_others_are_snr(name, options, prediction):
    weights = loss_weights(LINEAR, prediction, name, **options)
    np.testing.assert_allclose(weights, loss_weights(LINEAR, prediction, "snr"), rtol=1e-14)


def test_min_snr_of_v_is_the_published_one():
    """min(SNR, gamma) / (SNR + 1) for v and min(1, gamma / SNR) for eps (arXiv:2303.09556, section 3.4)."""
    ratio = snr(LINEAR)
    np.testing.assert_allclose(loss_weights(LINEAR, "v", "min_snr")[1:], np.minimum(ratio, 5) / (ratio + 1), rtol=1e-9)
    np.testing.assert_allclose(loss_weights(LINEAR, "eps", "min_snr")[1:], np.minimum(1, 5 / ratio), rtol=1e-9)


def test_p2_of_eps_is_the_published_one():
    for k, gamma in ((1.0, 1.0), (2.0, 0.5)):
        weights = loss_weights(LINEAR, "eps", "p2", k=k, gamma=gamma)[1:]
        np.testing.assert_allclose(weights, (k + snr(LINEAR)) ** -gamma, rtol=1e-9)


def test_edm_weights_the_denoiser_as_published():
    sigma = np.sqrt(SCHEDULES["edm"].noise_var[1:])
    for data in (0.5, 1.0):
        wanted = (sigma**2 + data**2) / (sigma * data) ** 2
        np.testing.assert_allclose(on_x0(SCHEDULES["edm"], "edm", sigma_data=data), wanted, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_edm_weights_the_error_of_its_own_output_by_one(schedule):
    """lambda(sigma) = 1 / c_out^2 (arXiv:2206.00364, section 5), whatever the schedule."""
    np.testing.assert_allclose(loss_weights(schedule, "edm", "edm")[1:], 1, rtol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "edm", "rectified_flow"])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_of_eps_is_the_published_one_times_the_pace_of_log_snr(name, bias):
    """sigmoid(bias - l) (-dl/du), l = log SNR, u = t/T; the derivative by central differences, away from the ends."""
    schedule, inner = SCHEDULES[name], slice(100, 900)
    log_snr = np.log(snr(schedule)[:-1])
    pace = -np.gradient(log_snr, edge_order=2) * 1000
    wanted = pace / (1 + np.exp(log_snr - bias))
    got = on_x0(schedule, "sigmoid", bias=bias)[:-1] / snr(schedule)[:-1]
    np.testing.assert_allclose(got[inner], wanted[inner], rtol=2e-3)


@pytest.mark.parametrize("bias", [-2.0, 1.0])
def test_sigmoid_is_one_integral_over_log_snr_for_every_schedule(bias):
    """The mean over t of the weight is exp(bias) softplus(log SNR - bias) at the first edge, less that at T."""
    for schedule in SCHEDULES.values():
        num = schedule.num_timesteps
        widths = np.append(np.ones(num - 1), 0.5)
        power, noise = schedule.powers(0.5)
        first = np.log1p(power / noise * np.exp(-bias))
        final = np.log1p(snr(schedule)[-1] * np.exp(-bias))
        total = np.sum(widths * on_x0(schedule, "sigmoid", bias=bias)) / num
        np.testing.assert_allclose(total, np.exp(bias) * (first - final), rtol=1e-10)


def test_sigmoid_with_a_high_bias_is_the_weight_of_the_variational_bound():
    """exp(b) sigmoid(l - b) tends to SNR: the fall of SNR over each cell (arXiv:2107.00630, Eq. 14, without 1/2)."""
    power, noise = LINEAR.powers(np.arange(1000) + 0.5)
    fall = -np.diff(power / noise) * 1000
    np.testing.assert_allclose(on_x0(LINEAR, "sigmoid", bias=30.0)[:-1], fall, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_and_not_negative_or_refused_with_a_remedy(schedule, prediction, name):
    schedule = SCHEDULES[schedule]
    silent = [p for p in PREDICTIONS if error_ratio(p, *schedule.at(schedule.num_timesteps)) == 0]
    if prediction in silent and name != "simple":
        with refused(f"t = {schedule.num_timesteps}, where the SNR is 0; predict .*v or .*, or use"):
            loss_weights(schedule, prediction, name)
        return
    weights = loss_weights(schedule, prediction, name)
    assert weights.dtype == np.float64
    assert weights.shape == (schedule.num_timesteps + 1,)
    assert np.all(np.isfinite(weights))
    assert np.all(weights[1:] >= 0)
    assert np.all(weights[1:-1] > 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min_srn", {}, "did you mean 'min_snr'"),
        ("min_snr", {"gamma": 0.0}, "gamma of weighting min_snr is 0.0; it must be above 0"),
        ("min_snr", {"gamma": np.nan}, "gamma"),
        ("p2", {"gamma": -1.0}, "gamma of weighting p2"),
        ("p2", {"k": -1.0}, "k of weighting p2"),
        ("edm", {"sigma_data": 0.0}, "sigma_data"),
        ("sigmoid", {"bias": np.inf}, "bias"),
        ("sigmoid", {"bias": np.nan}, "bias"),
    ],
)
def test_wrong_names_and_numbers_are_refused(name, options, message):
    with refused(message):
        loss_weights(LINEAR, "v", name, **options)
    with refused("prediction is 'epsilon'; did you mean 'eps'"):
        loss_weights(LINEAR, "epsilon", "snr")
