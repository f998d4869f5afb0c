"""Laws of what is put around a network: a classifier's gradient, a function of estimates, a callback, other times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import schedules, testbeds
from diffusion.around import Steering, rescaled_times
from diffusion.guidance import Guidance
from diffusion.solvers import ddim, dpm_solver_pp, unipc

pytestmark = pytest.mark.usefixtures("float64")

T = 50
LINEAR = schedules.linear(T, 1e-3, 0.12)
TAU = [T, 38, 21, 9, 2, 0]
SHAPE = (2, 3)
MEAN, VARIANCE, ERROR, SEEN = 0.3, 0.7, 0.2, -0.9  # of the data, and a value of x_0 plus an error that was measured


def network(params, x, t, cond=None):
    cond = 0.0 if cond is None else cond.reshape(-1, 1, 1)
    return jnp.tanh(params * x + cond) * 0.4 + 0.3 * x - 0.2 * jnp.sin(t.reshape(-1, 1, 1))


def classifier(params, x, t, cond):
    return jnp.sum(jnp.cos(params * x) * jnp.cos(t.reshape(-1, 1, 1) / 9), axis=(1, 2))


def draw(apply_fn=network, params=0.7, table=None, **options):
    table = ddim(LINEAR, TAU) if table is None else table
    return diffusion.sample(apply_fn, np.array(params), table, jax.random.key(0), 3, SHAPE, **options)


def measured(params, x, t, cond):
    """log p(SEEN | x_t) of Gaussian data: SEEN is normal around E[x_0 | x_t]."""
    a, n = (jnp.interp(t, np.arange(T + 1), level).reshape(-1, 1, 1) for level in LINEAR.at(np.arange(T + 1)))
    spread = a**2 * VARIANCE + n**2
    mean = MEAN + a * VARIANCE / spread * (x - a * MEAN)
    return -jnp.sum((SEEN - mean) ** 2 / (2 * (VARIANCE * n**2 / spread + ERROR)), axis=(1, 2))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("build", [ddim, lambda *a: ddim(*a, eta=1.0), dpm_solver_pp, unipc])
def test_the_exact_classifier_of_gaussian_data_draws_from_the_posterior(prediction, build):
    table = build(LINEAR, TAU)
    prior = testbeds.gaussian(LINEAR, np.full(SHAPE, MEAN), np.full(SHAPE, VARIANCE), prediction)
    # Bayes' rule in closed form: the same samples as of the network of that Gaussian.
    variance = 1 / (1 / VARIANCE + 1 / ERROR)
    mean = variance * (MEAN / VARIANCE + SEEN / ERROR)
    posterior = testbeds.gaussian(LINEAR, np.full(SHAPE, mean), np.full(SHAPE, variance), prediction)
    shared = (table, jax.random.key(1), 4, SHAPE)
    steered = diffusion.sample(*prior, *shared, prediction=prediction, steering=Steering(measured))
    expected = diffusion.sample(*posterior, *shared, prediction=prediction)
    np.testing.assert_allclose(steered, expected, rtol=0, atol=1e-8)
    plain = diffusion.sample(*prior, *shared, prediction=prediction)
    assert np.abs(plain - expected).mean() > 0.1


def by_hand(scale=0.0, function=lambda x0: x0, clip=False):
    """DDIM in plain NumPy with eps - n scale grad log p, as guided-diffusion's condition_score has it."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0) for i in range(3)]
    x = np.stack([jax.random.normal(k, SHAPE, np.float64) for k in keys])
    (a, n) = LINEAR.at(TAU)
    for i, t in enumerate(TAU[:-1]):
        gradient = -1.3 * np.sin(1.3 * x) * np.cos(t / 9)
        eps = np.asarray(network(0.7, x, np.full(3, float(t)))) - n[i] * scale * gradient
        x0 = function((x - n[i] * eps) / a[i])
        x0 = np.clip(x0, -1, 1) if clip else x0
        x = a[i + 1] * x0 + n[i + 1] * (x - a[i] * x0) / n[i]
    return x


def test_a_classifier_changes_eps_by_its_gradient():
    steering = Steering(classifier, np.array(1.3), scale=2.5)
    np.testing.assert_allclose(draw(steering=steering), by_hand(2.5), rtol=0, atol=1e-12)
    assert np.abs(by_hand(2.5) - by_hand()).max() > 0.1


def test_a_function_of_the_estimate_comes_after_the_classifier_and_before_clipping():
    def halves(x0, t):
        assert t.shape == (3,)
        return 3 * x0 - 0.1

    steering = Steering(classifier, np.array(1.3), 0.5, halves)
    expected = by_hand(0.5, lambda x0: 3 * x0 - 0.1, clip=True)
    np.testing.assert_allclose(draw(steering=steering, clip="recompute"), expected, rtol=0, atol=1e-12)
    only = draw(steering=Steering(denoised_fn=halves))
    np.testing.assert_allclose(only, by_hand(function=lambda x0: 3 * x0 - 0.1), rtol=1e-12, atol=1e-12)


def test_steering_adds_to_guidance():
    asked = {"cond": np.array([1.0, -0.6, 2.0]), "return_trajectory": True}
    guidance = Guidance(scale=3.0, null=np.zeros(3))
    steering = Steering(classifier, np.array(1.3), scale=0.5)
    both, guided, steered, plain = (
        draw(guidance=g, steering=s, **asked)[1].x0[0]
        for g, s in ((guidance, steering), (guidance, None), (None, steering), (None, None))
    )
    np.testing.assert_allclose(both - guided, steered - plain, rtol=0, atol=1e-12)
    assert np.abs(both - guided).max() > 1e-3


def test_keep_eps_keeps_the_eps_that_the_classifier_has_changed():
    steering = Steering(classifier, np.array(1.3), scale=0.5)
    _, passed = draw(steering=steering, clip="keep_eps", return_trajectory=True)
    _, free = draw(steering=steering, return_trajectory=True)
    (a, n), x = LINEAR.at(TAU), passed.x[0]
    eps = (x - a[0] * free.x0[0]) / n[0]
    np.testing.assert_allclose(passed.x[1], a[1] * np.clip(free.x0[0], -1, 1) + n[1] * eps, rtol=0, atol=1e-12)


def test_without_a_signal_the_classifier_says_nothing():
    schedule = schedules.rectified_flow(T)
    shared = {"table": ddim(schedule, TAU), "prediction": "flow", "return_trajectory": True}
    steering = Steering(classifier, np.array(1.3))
    (drawn, steered), (_, plain) = (draw(steering=s, **shared) for s in (steering, None))
    np.testing.assert_array_equal(steered.x0[0], plain.x0[0])
    assert np.all(np.isfinite(drawn))


def test_another_scale_compiles_nothing_and_gradients_pass():
    traced = []

    def counted(*args):
        traced.append(1)
        return network(*args)

    first = draw(counted, steering=Steering(classifier, np.array(1.3), scale=1.0))
    count = len(traced)
    draw(counted, steering=Steering(classifier, np.array(1.2), scale=2.0))
    assert len(traced) == count
    slope = jax.grad(lambda s: draw(counted, steering=Steering(classifier, np.array(1.3), scale=s)).sum())(1.0)
    ends = [float(draw(steering=Steering(classifier, np.array(1.3), scale=1 + way)).sum()) for way in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert np.all(np.isfinite(first))


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        (Steering(classifier, scale=np.nan), "scale of steering is nan"),
        (Steering(classifier, scale=np.ones(2)), "must be one finite number"),
        (Steering(classifier, scale="2"), "must be one finite number"),
        (classifier, "steering is a function; give diffusion.Steering"),
        (Steering(scale=2.0), "give its log_prob"),
        (Steering(params=1.0), "give its log_prob"),
        (Steering(lambda params, x, t, cond: x, scale=2.0), r"log_prob returns shape \(3, 2, 3\) for 3 samples"),
        (Steering(denoised_fn=lambda x0, t: x0[:1]), r"denoised_fn returns shape \(1, 2, 3\)"),
    ],
)
def test_wrong_steering_is_refused(steering, said):
    with refused(said):
        draw(steering=steering)


def test_a_network_of_mean_velocities_cannot_be_steered():
    schedule = schedules.rectified_flow(T)
    with refused("steering goes into estimates of x_0, which a network that predicts mean_flow makes none of"):
        draw(table=ddim(schedule, TAU), prediction="mean_flow", steering=Steering(classifier))


# A callback on the host


def test_a_callback_sees_every_stage_in_order():
    seen = []
    plain, passed = draw(return_trajectory=True)
    watched = draw(callback=lambda *what: seen.append(what))
    np.testing.assert_array_equal(watched, plain)
    assert [stage for stage, *_ in seen] == list(range(len(TAU) - 1))
    np.testing.assert_array_equal(np.stack([x for _, x, _ in seen]), passed.x[:-1])
    np.testing.assert_array_equal(np.stack([x0 for *_, x0 in seen]), passed.x0)


def test_another_callback_compiles_nothing():
    traced, seen = [], []

    def counted(*args):
        traced.append(1)
        return network(*args)

    draw(counted, callback=lambda *what: None)
    count = len(traced)
    draw(counted, callback=lambda *what: seen.append(what))
    assert (len(traced), len(seen)) == (count, len(TAU) - 1)


def test_a_callback_that_raises_ends_the_run_in_one_line(caplog):
    seen = []

    def careless(stage, x, x0):
        seen.append(stage)
        if stage == 2:
            raise KeyError("no such window")

    with refused("callback fails with KeyError: 'no such window' .test_around.py, line"):
        draw(callback=careless)
    assert seen == [0, 1, 2]
    assert not caplog.records  # JAX would log its own frames first
    assert np.all(np.isfinite(draw(callback=lambda *what: None)))  # and the next run is not held up by it


def test_a_callback_is_refused_where_sample_is_traced_and_where_it_is_no_function():
    with refused("call sample outside of jit"):
        jax.jit(lambda params: draw(params=0.7, table=ddim(LINEAR, TAU), x_init=params, callback=print))(
            np.zeros((3, *SHAPE))
        )
    with refused("callback is a int; give a function"):
        draw(callback=3)


def test_a_callback_sees_whole_batches_that_are_split_over_devices():
    mesh = jax.make_mesh((2,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    start = jax.device_put(np.random.default_rng(0).standard_normal((4, *SHAPE)), split)
    seen = []
    table, key = ddim(LINEAR, TAU), jax.random.key(0)
    drawn = diffusion.sample(
        network, np.array(0.7), table, key, 4, SHAPE, x_init=start, callback=lambda *what: seen.append(what)
    )
    assert [stage for stage, *_ in seen] == list(range(len(TAU) - 1))
    np.testing.assert_allclose(seen[0][1], start, rtol=1e-6)  # another thread, in which JAX has 32 bits
    np.testing.assert_allclose(seen[-1][2], drawn, rtol=1e-6)


# The time that a network is told


def test_rescaled_times_are_those_of_openai_for_t_of_4000():
    def told(params, x, t, cond=None):
        return jnp.broadcast_to(t[:, None, None], x.shape)

    network = rescaled_times(told, 4000)
    times = jnp.array([1.0, 2.0, 4000.0])
    counted_from_0 = np.arange(4000)
    expected = counted_from_0[[0, 1, 3999]] * (1000.0 / 4000)  # _WrappedModel.__call__ of guided-diffusion
    np.testing.assert_allclose(network(None, jnp.zeros((3, 1, 1)), times)[:, 0, 0], expected, rtol=1e-12)
    assert rescaled_times(told, 4000) is network
    with refused("num_timesteps is 0"):
        rescaled_times(told, 0)
