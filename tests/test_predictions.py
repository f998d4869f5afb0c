"""Laws of the table of predictions: everything follows from the pair (c, e)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import predictions, schedules, solvers, testbeds, timesteps
from diffusion.objectives.losses import Batch, simple_loss
from diffusion.predictions import PREDICTIONS

pytestmark = pytest.mark.usefixtures("float64")

DENOISERS = [kind for kind in PREDICTIONS if not predictions.sees_end(kind)]
RNG = np.random.default_rng(0)
LEVELS = [(0.9, 0.3), (0.3, 0.9), (1.0, 80.0), (1.0, 0.002), (0.5, 0.5), (1e-4, 1.0), (1.0, 1e-8)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_reading_of_a_target_is_x_0(prediction):
    x_0, eps = RNG.normal(size=(2, 50))
    for a, n in LEVELS:
        r = predictions.reading(prediction, np.float64(7), np.float64(a), np.float64(n))
        target = predictions.target(prediction, a, n, x_0, eps)
        got = r.from_x * (a * x_0 + n * eps) + r.from_output * target
        np.testing.assert_allclose(got, x_0, rtol=1e-9, atol=1e-9 * max(1, n / a))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_error_ratio_is_the_change_of_the_target_with_x_0_at_a_fixed_x(prediction):
    x = 0.7
    for a, n in LEVELS:

        def output(x_0, a=a, n=n):
            return predictions.target(prediction, a, n, x_0, (x - a * x_0) / n)

        slope = jax.grad(output)(0.3)
        np.testing.assert_allclose(predictions.error_ratio(prediction, a, n), abs(slope), rtol=1e-9)


def test_edm_is_the_preconditioning_of_its_paper():
    """Table 1 of arXiv:2206.00364 with sigma_data = 0.5: D = c_skip y + c_out F(c_in y, log(sigma) / 4)."""
    sigma = np.geomspace(0.002, 80, 30)
    r = predictions.reading("edm", np.arange(30.0), np.ones(30), sigma)
    np.testing.assert_allclose(r.from_x, 0.25 / (sigma**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(r.from_output, sigma * 0.5 / np.sqrt(sigma**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(r.input_scale, 1 / np.sqrt(sigma**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(r.time, np.log(sigma) / 4, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_clean_data_the_estimate_is_x_itself(prediction):
    """n = 0 and a = 1: the formula is 0 / 0 for x_0, and the estimate must still be x."""
    x_0 = RNG.normal(size=20)
    one, zero = np.float64(1), np.float64(0)
    for numbers in ((one, zero), (jnp.asarray(one), jnp.asarray(zero))):
        r = predictions.reading(prediction, np.float64(0), *numbers)
        output = predictions.target(prediction, *numbers, x_0, RNG.normal(size=20) if prediction != "x0" else x_0)
        np.testing.assert_allclose(r.from_x * x_0 + r.from_output * output, x_0, rtol=1e-12)


def test_jax_and_numpy_read_alike():
    t, (a, n) = np.arange(1.0, 41), schedules.cosine(40).at(np.arange(1, 41))
    for prediction in PREDICTIONS:
        plain = predictions.reading(prediction, t, a, n)
        traced = jax.jit(lambda *levels, p=prediction: predictions.reading(p, *levels))(t, a, n)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), plain, traced)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.edm(), schedules.rectified_flow()], ids=str)
@pytest.mark.parametrize("prediction", [p for p in DENOISERS if p != "x0"])
def test_networks_that_are_exact_on_gaussian_data_give_the_same_samples(prediction, schedule):
    """To 1e-6, on every schedule, through solvers of all kinds; from 0.95 T, where there is signal."""
    tau = np.append(np.linspace(0.95 * schedule.num_timesteps, 1, 9), 0)
    for build in (solvers.ddim, solvers.unipc, solvers.heun, lambda s, t: solvers.ddim(s, t, eta=1.0)):
        table = build(schedule, tau)
        samples = [
            np.asarray(diffusion.sample(*bed, table, jax.random.key(3), 20, (4,), prediction=p))
            for p in ("x0", prediction)
            for bed in [testbeds.gaussian(schedule, [0.3, -0.1, 0.0, 0.5], [0.2, 0.01, 0.5, 0.1], p)]
        ]
        np.testing.assert_allclose(*samples, rtol=0, atol=1e-6)
        assert np.std(samples[0]) > 0.1


@pytest.mark.parametrize("schedule", [schedules.linear(40), schedules.edm(40), schedules.rectified_flow(40)], ids=str)
@pytest.mark.parametrize("prediction", DENOISERS)
def test_a_network_that_is_asked_as_its_prediction_wants_has_no_loss(prediction, schedule):
    """An ideal denoiser of one image knows x_0, in whatever clock and scale it is asked."""
    image = RNG.uniform(-1, 1, (1, 3, 2, 1))
    bed = testbeds.ideal(schedule, image, prediction)
    keys = jax.random.split(jax.random.key(0), 39)
    batch = Batch(
        lambda *args: bed.apply_fn(bed.params, *args), jnp.asarray(image.repeat(39, 0)), None, keys, jnp.arange(39), 40
    )
    loss = simple_loss(batch, schedule, prediction)
    np.testing.assert_array_equal(loss.t, np.arange(1, 40))
    np.testing.assert_allclose(loss.value, 0, atol=1e-12)


def test_a_prediction_of_mean_velocities_is_no_denoiser():
    schedule = schedules.rectified_flow(40)
    with refused("a testbed is a denoiser, and mean_flow says where a step ends"):
        testbeds.gaussian(schedule, 0.0, 1.0, "mean_flow")
    batch = Batch(
        lambda x, t, cond: x, jnp.zeros((1, 2)), None, jax.random.split(jax.random.key(0), 1), jnp.zeros(1), 1
    )
    with refused("prediction mean_flow is learned by the objectives mean_flow"):
        simple_loss(batch, schedule, "mean_flow")


def test_what_says_nothing_about_x_0_is_refused_with_what_does():
    schedule = schedules.zero_terminal_snr(schedules.linear(40))
    table = solvers.ddim(schedule, timesteps.uniform(schedule, 4))
    for prediction in ("eps", "edm"):
        with refused(f"where {prediction} says nothing about x_0; use a model that predicts one of x0, v, flow"):
            predictions.check_signal("it", prediction, table.t, table.signal, table.noise)
    for prediction in ("x0", "v", "flow"):
        predictions.check_signal("it", prediction, table.t, table.signal, table.noise)
    with refused("prediction is 'epsilon'; did you mean 'eps'"):
        predictions.check_known("epsilon")
