"""Laws of the training objectives, of the timesteps they are evaluated at, and of how a config chooses them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from reference import refused
from scipy.stats import norm

from configs.default import get_config
from diffusion import devices, gaussian, predictions, schedules
from diffusion.commands import objectives
from diffusion.model import make_model
from diffusion.objectives import losses
from diffusion.objectives.losses import LEARN_VARIANCE, Batch, stratified_timesteps
from diffusion.objectives.weightings import WEIGHTINGS, loss_weights
from diffusion.solvers import ddpm

LINEAR = schedules.linear()
SHORT = schedules.linear(20, 0.01, 0.4)


def of_parts(objective):
    """An objective as a function of the parts of its batch, which here have names of their own."""

    def loss(network, schedule, x_0, cond, keys, index, batch_size, **options):
        return objective(Batch(network, x_0, cond, keys, index, batch_size), schedule, **options)

    return loss


OBJECTIVES = {name: of_parts(objective) for name, objective in losses.OBJECTIVES.items()}
simple_loss, hybrid_loss, vlb_loss = (OBJECTIVES[name] for name in ("simple", "hybrid", "vlb"))
SAMPLES = ("eps", "x0", "v", "flow")
"""The predictions whose network sees x_t and t as they are."""


def target(prediction, schedule, x_0, t, eps):
    return predictions.target(prediction, *gaussian.signal_noise(schedule, t, x_0), x_0, eps)


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
@pytest.mark.parametrize("prediction", SAMPLES)
def test_the_exact_predictor_has_no_loss(prediction):
    """A network that knows x_0 finds eps and v from x_t."""
    x_0 = jax.random.normal(jax.random.key(1), (32, 4, 4, 3))

    def knows_x0(x_t, t, cond):
        eps = gaussian.predict_eps(LINEAR, x_t, t, cond)
        v = gaussian.velocity(LINEAR, cond, t, eps)
        return {"eps": eps, "x0": cond, "v": v, "flow": eps - cond}[prediction]

    run = jax.jit(lambda x, keys: simple_loss(knows_x0, LINEAR, x, x, keys, jnp.arange(32), 32, prediction=prediction))
    loss = run(x_0, batch_keys(32)).value
    assert loss.shape == (32,)
    np.testing.assert_allclose(loss, 0, atol=1e-20)


def test_the_zero_network_loses_the_variance_of_its_target():
    """Five standard errors; E eps^2 = 1, x_0^2 is known, and v has variance a^2 + n^2 x_0^2 for fixed x_0."""
    x_0 = jnp.full((256, 16, 16, 1), 0.5)
    run = jax.jit(
        lambda prediction: (
            simple_loss(
                zero_network, LINEAR, x_0, None, batch_keys(256), jnp.arange(256), 256, prediction=prediction
            ).value
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
    np.testing.assert_allclose(loss.value, wanted, rtol=1e-3)
    np.testing.assert_array_equal(loss.t, seen["t"])
    np.testing.assert_array_equal((seen["t"] - 1) // 125, np.arange(8))
    assert abs(np.mean(eps)) < 5 / eps.size**0.5
    assert np.abs(np.corrcoef(np.asarray(eps).reshape(8, -1)) - np.eye(8)).max() < 0.9


# Every objective


def pixels(number, shape=(4, 4, 1), seed=1):
    """8-bit images in [-1, 1], some pixels at both ends."""
    return np.random.default_rng(seed).choice(256, (number, *shape)) / 127.5 - 1


def two_headed(x_t, t, cond):
    """A prediction, then a share between the two variances that goes a little beyond both."""
    moved = jnp.tanh(x_t * cond["slope"]) + t[:, None, None, None] / 50
    return jnp.concatenate([moved, 1.2 * jnp.sin(3 * x_t + cond["shift"])], axis=-1)


def one_headed(x_t, t, cond):
    return two_headed(x_t, t, cond)[..., : x_t.shape[-1]]


COND = {"slope": np.array(0.7), "shift": np.array(0.3)}


def call(objective, x_0, keys, index, batch_size, cond=COND, **options):
    network = two_headed if objective in LEARN_VARIANCE else one_headed
    loss = partial(OBJECTIVES[objective], network, SHORT, batch_size=batch_size, **options)
    return jax.jit(loss)(x_0, cond, keys, index)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_sample_does_not_depend_on_the_batch_around_it(objective):
    x_0, index = jnp.asarray(pixels(8)), jnp.arange(8)
    loss = jax.jit(lambda part: call(objective, x_0[part], batch_keys(8)[part], index[part], 8))
    whole = loss(np.arange(8))
    assert np.unique(whole.t).size == 8
    for part in (np.array([6]), np.array([5, 2, 7, 0, 1, 3, 6, 4])):
        jax.tree.map(lambda a, b, p=part: np.testing.assert_allclose(a, b[p], rtol=1e-12), loss(part), whole)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_run_inside_shard_map_and_scan(objective):
    """The gradient of the mean over four shares and two micro-batches is that of the batch."""
    x_0, keys, index = jnp.asarray(pixels(8), jnp.float32), batch_keys(8), jnp.arange(8)

    def mean_loss(cond, x_0, keys, index):
        return call(objective, x_0, keys, index, 8, cond).value.mean()

    def share(cond, *batch):
        def body(total, part):
            value, grads = jax.value_and_grad(mean_loss)(cond, *jax.tree.map(lambda leaf: leaf[None], part))
            return jax.tree.map(jnp.add, total, (value, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, cond))
        total, _ = jax.lax.scan(body, zero, batch)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data") / 2, total)

    specs = (PartitionSpec(), *[PartitionSpec("data")] * 3)
    cond = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), COND)
    sharded = jax.shard_map(
        share, mesh=devices.data_mesh(4), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    got = jax.jit(sharded)(cond, x_0, keys, index)
    wanted = jax.value_and_grad(mean_loss)(cond, x_0, keys, index)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, wanted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_error_is_the_plain_one_and_times_and_noise_are_those_of_simple(objective):
    plain = call("simple", pixels(20), batch_keys(20), jnp.arange(20), 20)
    np.testing.assert_array_equal(plain.value, plain.error)
    loss = call(objective, pixels(20), batch_keys(20), jnp.arange(20), 20)
    np.testing.assert_array_equal(loss.t, np.arange(1, 21))
    np.testing.assert_allclose(loss.error, plain.error, rtol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_unknown_prediction_is_refused_with_the_nearest_name(objective):
    with refused("'epsilon'; did you mean 'eps'"):
        call(objective, pixels(1), batch_keys(1), jnp.arange(1), 1, prediction="epsilon")


# Weights


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("schedule", [LINEAR, schedules.edm(), schedules.rectified_flow(40)], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "simple"])
def test_a_weighted_loss_is_the_same_number_whatever_the_network_predicts(schedule, name):
    x_0 = pixels(40)

    def loss(prediction):
        def network(x_t, t, cond):
            x0_hat = 0.8 * jnp.tanh(x_t)
            return target(prediction, schedule, x0_hat, t, gaussian.predict_eps(schedule, x_t, t, x0_hat))

        weights = loss_weights(schedule, prediction, name)
        options = {"prediction": prediction, "weights": weights}
        return simple_loss(network, schedule, x_0, None, batch_keys(40), jnp.arange(40), 40, **options)

    wanted = loss("x0")
    np.testing.assert_allclose(wanted.value, loss_weights(schedule, "x0", name)[wanted.t] * wanted.error, rtol=1e-12)
    for prediction in ("v", "flow", *(["eps"] if schedule.alpha_bar[-1] else [])):
        np.testing.assert_allclose(loss(prediction).value, wanted.value, rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_weights_of_hybrid_are_those_of_its_simple_part():
    weights = np.random.default_rng(0).uniform(size=21)
    plain, weighted = (
        call("hybrid", pixels(20), batch_keys(20), jnp.arange(20), 20, weights=w) for w in (None, weights)
    )
    np.testing.assert_allclose(weighted.value - plain.value, (weights[plain.t] - 1) * plain.error, rtol=1e-9)


# The variational bound


def bound_by_hand(schedule, x_0, prediction, cond):
    """T L_{t-1} of each sample with the same draws, by SciPy and the general divergence of two normal densities."""
    seen = {}

    def spy(x_t, t, cond):
        seen.update(x_t=np.asarray(x_t), t=np.asarray(t))
        return one_headed(x_t, t, cond)

    num = len(x_0)
    simple_loss(spy, schedule, x_0, cond, batch_keys(num), jnp.arange(num), num, prediction=prediction)
    x_t, t = seen["x_t"], seen["t"]
    output, share = np.split(np.asarray(two_headed(x_t, t, cond)), 2, axis=-1)
    table, values = ddpm(schedule, range(schedule.num_timesteps, -1, -1), "learned"), []
    for i in range(num):
        a, n = schedule.at(t[i])
        readings = {"eps": (1 / a, -n / a), "x0": (0, 1), "v": (a, -n), "flow": (1 / (a + n), -1 / (a + n) * n)}
        x0_hat = readings[prediction][0] * x_t[i] + readings[prediction][1] * output[i]
        low, high = table.log_variance[schedule.num_timesteps - t[i]]
        std = np.exp(0.5 * (low + (share[i] + 1) / 2 * (high - low)))
        if t[i] == 1:
            upper = np.where(x_0[i] > 0.999, np.inf, x_0[i] + 1 / 255)
            lower = np.where(x_0[i] < -0.999, -np.inf, x_0[i] - 1 / 255)
            nats = -np.log(norm.cdf(upper, x0_hat, std) - norm.cdf(lower, x0_hat, std))
        else:
            (true, variance), (model, _) = (
                gaussian.posterior(schedule, x_t[i][None], x[None], t[i], t[i] - 1) for x in (x_0[i], x0_hat)
            )
            ratio = variance / std**2
            nats = 0.5 * (ratio - 1 - np.log(ratio) + (true - model)[0] ** 2 / std**2)
        values.append(schedule.num_timesteps * np.mean(nats) / np.log(2))
    return np.array(values)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prediction", SAMPLES)
def test_vlb_is_the_bound_by_hand(prediction):
    wanted = bound_by_hand(SHORT, pixels(20), prediction, COND)
    assert np.all(np.isfinite(wanted))
    got = call("vlb", pixels(20), batch_keys(20), jnp.arange(20), 20, prediction=prediction)
    np.testing.assert_allclose(got.value, wanted, rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_hybrid_is_simple_and_a_thousandth_of_the_bound():
    args = (pixels(20), batch_keys(20), jnp.arange(20), 20)
    simple, vlb, hybrid = (call(objective, *args, prediction="v").value for objective in ("simple", "vlb", "hybrid"))
    np.testing.assert_allclose(hybrid, simple + 0.001 * vlb, rtol=1e-12)
    more = call("hybrid", *args, prediction="v", vlb_weight=0.5).value
    np.testing.assert_allclose(more, simple + 0.5 * vlb, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_hybrid_moves_the_prediction_by_simple_and_the_variance_by_the_bound():
    x_0, keys, index = pixels(20), batch_keys(20), jnp.arange(20)

    def grads(loss, parts=2):
        def value(added):
            def network(x_t, t, cond):
                output = two_headed(x_t, t, cond) + added
                return output[..., :parts]

            return loss(network, SHORT, x_0, COND, keys, index, 20).value.sum()

        return np.split(np.asarray(jax.grad(value)(jnp.zeros((20, 4, 4, 2)))), 2, axis=-1)

    mean, variance = grads(hybrid_loss)
    np.testing.assert_allclose(mean, grads(simple_loss, parts=1)[0], rtol=1e-10, atol=1e-12)
    vlb_mean, vlb_variance = grads(vlb_loss)
    np.testing.assert_allclose(variance, 0.001 * vlb_variance, rtol=1e-9, atol=1e-14)
    assert np.min(np.abs(vlb_variance)) > 0
    assert np.min(np.max(np.abs(vlb_mean), axis=(1, 2, 3))) > 1e-6


@pytest.mark.parametrize("schedule", [LINEAR, schedules.cosine(), schedules.linear(1)], ids=["linear", "cosine", "one"])
@pytest.mark.parametrize("output", [0.0, 3.0])
@pytest.mark.parametrize("objective", LEARN_VARIANCE)
def test_gradients_are_finite_in_single_precision_at_every_timestep(objective, output, schedule):
    """A network that has learned nothing yet, and one far off, at T timesteps of 8-bit pixels."""
    num = schedule.num_timesteps

    def value(output):
        network = lambda x_t, t, cond: output + jnp.zeros((*x_t.shape[:-1], 2))  # noqa: E731
        x_0 = jnp.asarray(pixels(num, (2, 2, 1)), jnp.float32)
        loss = OBJECTIVES[objective](network, schedule, x_0, None, batch_keys(num), jnp.arange(num), num)
        return loss.value.sum(), loss.value

    grads, values = jax.jit(jax.grad(value, has_aux=True))(jnp.full((num, 2, 2, 2), output))
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(grads))
    assert np.all(np.max(np.abs(grads), axis=(1, 2, 3)) > 0)


@pytest.mark.usefixtures("float64")
def test_what_an_objective_cannot_take_is_refused():
    args = (SHORT, pixels(1), COND, batch_keys(1), jnp.arange(1), 1)
    with refused("objective simple leaves untrained"):
        simple_loss(two_headed, *args)
    for loss in (hybrid_loss, vlb_loss):
        with refused("returned 1 channels.*twice"):
            loss(one_headed, *args)
        with refused("zero signal"):
            loss(two_headed, schedules.zero_terminal_snr(SHORT), *args[1:])
    with refused("weights"):
        vlb_loss(two_headed, *args, weights=np.ones(21))
    with refused("shape"):
        simple_loss(lambda x_t, t, cond: x_t[:, :2], *args)


# The config


def train_section(**fields):
    section = get_config().train
    section.update(ConfigDict(fields))
    return section


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_config_names_an_objective(objective):
    prediction, args = "v", (pixels(20), batch_keys(20), jnp.arange(20), 20)
    got = objectives.make_objective(train_section(objective=objective, prediction=prediction), SHORT)
    network = two_headed if objective in LEARN_VARIANCE else one_headed
    got = got(Batch(network, args[0], COND, *args[1:]))
    wanted = call(objective, *args, prediction=prediction)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, wanted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("min_snr", "min_snr", {}),
        ("min_snr:gamma=3", "min_snr", {"gamma": 3.0}),
        ("min_snr:gamma=inf", "snr", {}),
        ("p2:k=2,gamma=0.5", "p2", {"k": 2.0, "gamma": 0.5}),
    ],
)
@pytest.mark.parametrize("objective", ["simple", "hybrid"])
def test_a_config_names_a_weighting_with_options(text, name, options, objective):
    args = (pixels(20), batch_keys(20), jnp.arange(20), 20)
    got = objectives.make_objective(train_section(objective=objective, prediction="v", weighting=text), SHORT)
    network = two_headed if objective == "hybrid" else one_headed
    weights = loss_weights(SHORT, "v", name, **options)
    wanted = call(objective, *args, prediction="v", weights=weights)
    got = got(Batch(network, args[0], COND, *args[1:]))
    np.testing.assert_allclose(got.value, wanted.value, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "hybird"}, "config.train.objective is 'hybird'; did you mean 'hybrid'"),
        ({"weighting": "minsnr"}, "config.train.weighting is 'minsnr'; did you mean 'min_snr'"),
        ({"weighting": "min_snr:gama=5"}, "config.train.weighting min_snr has no option 'gama'; did you mean 'gamma'"),
        ({"weighting": "min_snr:gamma"}, "config.train.weighting option 'gamma' has no value; write min_snr:gamma=V"),
        ({"weighting": "min_snr:gamma=x"}, "config.train.weighting option min_snr:gamma is 'x'; write a number"),
        ({"weighting": "min_snr:gamma=-1"}, "gamma of weighting min_snr is -1"),
        ({"weighting": "snr:prediction=v"}, "no option 'prediction'; it has no options"),
        ({"objective": "vlb", "weighting": "snr"}, "config.train.weighting is 'snr', but objective vlb"),
        ({"objective": "hybrid:vlb_weight=nan"}, "vlb_weight of objective hybrid is nan"),
        ({"objective": "hybrid:vlb_weight=-1"}, "vlb_weight of objective hybrid is -1"),
        ({"objective": "hybrid:vlb_weight=inf"}, "vlb_weight of objective hybrid is inf"),
        ({"objective": "hybrid:vlb_weight=1,2"}, "write one number"),
    ],
)
def test_a_wrong_choice_in_the_config_is_refused(fields, message):
    with refused(message):
        objectives.make_objective(train_section(**fields), SHORT)


@pytest.mark.parametrize("fields", [{"objective": "hybrid"}, {"objective": "vlb"}, {"weighting": "snr"}], ids=str)
def test_eps_where_there_is_no_signal_is_refused_when_the_objective_is_made(fields):
    with refused("signal|SNR is 0"):
        objectives.make_objective(train_section(**fields), schedules.zero_terminal_snr(SHORT))
    for prediction in ("x0", "v", "flow"):
        objectives.make_objective(train_section(prediction=prediction, **fields), schedules.zero_terminal_snr(SHORT))
    with refused("prediction is edm, whose network is given log"):
        objectives.make_objective(train_section(prediction="edm", **fields), schedules.zero_terminal_snr(SHORT))


def model_config(objective, out_channels):
    config = get_config()
    config.model.update({"width": 4, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": ()})
    config.train.objective, config.model.out_channels = objective, out_channels
    return config


@pytest.mark.parametrize(("objective", "channels"), [("simple", 3), ("hybrid", 6), ("vlb", 6)])
def test_a_model_has_twice_the_channels_where_its_objective_learns_the_variance(objective, channels):
    for out_channels in (0, channels):
        model = make_model(model_config(objective, out_channels), (8, 8, 3))
        assert model.learned_variance == (channels == 6)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.eval_shape(model.apply_fn, params, jnp.zeros((2, 8, 8, 3)), jnp.ones(2)).shape == (2, 8, 8, channels)
    with refused(f"out_channels is {9 - channels}; samples have 3 channels and objective {objective} wants {channels}"):
        make_model(model_config(objective, 9 - channels), (8, 8, 3))
