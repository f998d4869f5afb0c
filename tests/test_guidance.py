"""Laws of guidance beyond plain classifier-free guidance: its rules, its struct, and a second network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import sampling, schedules, testbeds, timesteps
from diffusion.guidance import RULES, Guidance, Pair
from diffusion.solvers import ddim, unipc

pytestmark = pytest.mark.usefixtures("float64")

T = 50
LINEAR = schedules.linear(T, 1e-3, 0.12)
FLOW = schedules.rectified_flow(T)
TAU = [T, 38, 21, 9, 2, 0]
COND, NULL = np.array([1.0, -0.6, 2.0]), np.array([0.1, 0.1, -0.2])
SHAPE = (2, 4)


def per_sample(values, x):
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


def network(params, x, t, cond=None):
    cond = 0.0 if cond is None else per_sample(cond, x)
    return jnp.tanh(params * x + cond) * (0.4 + 0.1 * cond) + 0.3 * x - 0.2 * jnp.sin(per_sample(t, x))


def draw(guidance=None, table=None, **options):
    table = ddim(LINEAR, TAU) if table is None else table
    options = {"cond": COND, "guidance": guidance, **options}
    return np.asarray(diffusion.sample(network, np.array(0.7), table, jax.random.key(0), 3, SHAPE, **options))


def start(stage=0):
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), stage) for i in range(3)]
    return np.stack([jax.random.normal(k, SHAPE, np.float64) for k in keys])


def by_hand(rule, schedule=LINEAR, prediction="eps"):
    """DDIM over TAU in plain NumPy; rule(c, u, x0, step) -> guided output, x0 turning an output into an estimate."""
    (a, n), x = schedule.at(TAU), start()
    for i, t in enumerate(TAU[:-1]):
        t = np.full(3, t, np.float64)
        c, u = (np.asarray(network(0.7, x, t, cond)) for cond in (COND, NULL))

        def x0(output, x=x, i=i):
            return (x - n[i] * output) / a[i] if prediction == "eps" else (x - n[i] * output) / (a[i] + n[i])

        estimate = x0(rule(c, u, x0, i))
        x = a[i + 1] * estimate + n[i + 1] * (x - a[i] * estimate) / n[i]
    return x


def dot(a, b):
    return np.sum(a * b, axis=(1, 2), keepdims=True)


def test_apg_without_any_of_its_changes_is_classifier_free_guidance():
    plain = draw(Guidance(3.0, NULL))
    np.testing.assert_allclose(draw(Guidance(3.0, NULL, rule="apg:eta=1,norm=0,momentum=0")), plain, rtol=1e-10)
    assert np.max(np.abs(draw(Guidance(3.0, NULL, rule="apg")) - plain)) > 0.1


@pytest.mark.parametrize(
    ("eta", "norm", "momentum"), [(0.0, 0.0, 0.0), (0.3, 0.5, 0.0), (0.0, 0.4, -0.5), (1.0, 15, 0.4)]
)
def test_apg_is_the_plain_loop_of_its_paper(eta, norm, momentum):
    """arXiv:2410.02416, Algorithm 1, on estimates of x_0: momentum, then the norm, then the projection."""
    average = 0.0

    def rule(c, u, x0, step):
        nonlocal average
        average = x0(c) - x0(u) + momentum * average
        update = average
        if norm:
            update = update * np.minimum(1, norm / np.sqrt(dot(update, update)))
        unit = x0(c) / np.sqrt(dot(x0(c), x0(c)))
        parallel = dot(update, unit) * unit
        guided = x0(c) + 1.7 * (update - parallel + eta * parallel)
        # The output that stands for this estimate: x0 is affine in the output.
        return c + (guided - x0(c)) / (x0(np.ones_like(c)) - x0(np.zeros_like(c)))

    got = draw(Guidance(2.7, NULL, rule=f"apg:eta={eta},norm={norm},momentum={momentum}"))
    np.testing.assert_allclose(got, by_hand(rule), rtol=1e-9, atol=1e-9)


def test_cfg_zero_scales_the_reference_by_least_squares():
    """arXiv:2503.18886, Eq. 8: the scale that brings the reference nearest to the conditional output."""

    def rule(c, u, x0, step):
        fits = [np.linalg.lstsq(u[i].reshape(-1, 1), c[i].ravel(), rcond=None)[0] for i in range(3)]
        scaled = np.array(fits).reshape(3, 1, 1) * u
        return scaled + 1.7 * (c - scaled)

    np.testing.assert_allclose(draw(Guidance(1.7, NULL, rule="cfg_zero")), by_hand(rule), rtol=1e-9, atol=1e-9)


def test_zero_init_leaves_a_flow_where_it_is():
    table = ddim(FLOW, TAU)
    options = {"prediction": "flow", "return_trajectory": True}
    _, path = diffusion.sample(
        network, 0.7, table, jax.random.key(0), 3, SHAPE, cond=COND,
        guidance=Guidance(2.0, NULL, rule="cfg_zero:zero_init=2"), **options,
    )  # fmt: skip
    for moved, before, after in zip([False, False, True, True, True], path.x[:-1], path.x[1:], strict=True):
        assert (np.max(np.abs(after - before)) > 1e-3) == moved


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "cfg++"])
def test_at_a_scale_of_one_a_rule_is_no_guidance(rule):
    np.testing.assert_array_equal(draw(Guidance(1.0, NULL, rule=rule)), draw())
    # The same if it is computed, as for a scale that is only 1 in places.
    np.testing.assert_allclose(draw(Guidance(lambda t: 1.0 + 0 * t, NULL, rule=rule)), draw(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", [ddim, unipc])
def test_every_rule_is_the_same_for_a_sample_in_any_batch(rule, build):
    table = build(LINEAR, TAU)
    whole = draw(Guidance(2.5, NULL, rule=rule, rescale=0.5), table)
    part = diffusion.sample(
        network, np.array(0.7), table, jax.random.key(0), 1, SHAPE, sample_ids=np.array([1]), cond=COND[1:2],
        guidance=Guidance(2.5, NULL[1:2], rule=rule, rescale=0.5),
    )  # fmt: skip
    np.testing.assert_allclose(part[0], whole[1], rtol=1e-10, atol=1e-12)


def test_a_scale_may_be_a_function_of_time_or_a_number_for_each_call():
    table = ddim(LINEAR, TAU)
    inside = draw(Guidance(2.0, NULL, interval=(9, 21)))
    np.testing.assert_allclose(
        draw(Guidance(lambda t: np.where((t >= 9) & (t <= 21), 2.0, 1.0), NULL)), inside, rtol=1e-12
    )
    np.testing.assert_allclose(draw(Guidance(np.array([1.0, 1.0, 2.0, 2.0, 1.0]), NULL), table), inside, rtol=1e-12)
    assert np.max(np.abs(inside - draw(Guidance(2.0, NULL)))) > 1e-2


def test_guidance_passes_through_jit_and_grad():
    table = ddim(LINEAR, TAU)

    @jax.jit
    def mean(guidance):
        options = {"cond": jnp.asarray(COND), "guidance": guidance}
        return jnp.mean(diffusion.sample(network, 0.7, table, jax.random.key(0), 3, SHAPE, **options) ** 2)

    given = Guidance(jnp.asarray(2.0), jnp.asarray(NULL), rescale=jnp.asarray(0.3), rule="apg:norm=0.5")
    assert float(mean(given)) == pytest.approx(float(np.mean(draw(given) ** 2)), rel=1e-10)
    slope = jax.grad(mean)(given).scale
    numeric = (mean(given.replace(scale=jnp.asarray(2.001))) - mean(given.replace(scale=jnp.asarray(1.999)))) / 0.002
    assert float(slope) == pytest.approx(float(numeric), rel=1e-5)


def test_the_keywords_are_short_for_the_fields():
    keywords = {"guidance_scale": 2.5, "null_cond": NULL, "guidance_interval": (5, 30), "guidance_rescale": 0.4}
    fields = Guidance(2.5, NULL, (5, 30), 0.4)
    np.testing.assert_array_equal(draw(**keywords), draw(fields))
    np.testing.assert_array_equal(draw(**keywords, guidance_rule="apg"), draw(fields.replace(rule="apg")))
    with refused("guidance_scale is short for a field of guidance"):
        draw(fields, guidance_scale=2.0)
    with pytest.raises(TypeError, match="no argument 'guidance_scal'; did you mean 'guidance_scale'"):
        draw(guidance_scal=2.0)


def test_another_scale_or_interval_compiles_nothing_for_any_rule():
    for rule in RULES:
        draw(Guidance(2.0, NULL, rule=rule))
        before = sampling._run._cache_size()
        draw(Guidance(3.0, NULL, (5, 30), 0.3, rule=rule))
        draw(Guidance(lambda t: 1 + t / T, NULL, rule=rule))
        assert sampling._run._cache_size() == before


# A second network


def strong_and_weak():
    """Exact denoisers of the data and of a blurred version, which cannot be told conditions."""
    make = functools.partial(testbeds.gaussian, LINEAR, prediction="v")
    return make(0.3, 0.04), make(0.3, 0.16)


def test_autoguidance_extrapolates_from_the_weaker_network():
    """arXiv:2406.02507, Eq. 3, in one step, where the sample is the estimate of x_0 itself."""
    strong, weak = strong_and_weak()
    table = ddim(LINEAR, [T, 0])
    shared = (table, jax.random.key(1), 5, (3,))
    good, bad = (np.asarray(diffusion.sample(*bed, *shared, prediction="v")) for bed in (strong, weak))
    for scale in (0.0, 0.5, 3.0):
        guidance = Guidance(scale, reference_fn=weak.apply_fn, reference_params=weak.params)
        got = diffusion.sample(*strong, *shared, prediction="v", guidance=guidance)
        np.testing.assert_allclose(got, bad + scale * (good - bad), rtol=1e-9, atol=1e-12)


def test_autoguidance_narrows_what_a_broad_model_draws():
    """With both Gaussian the guided spread lies below the strong model's, as the weak one is broader."""
    strong, weak = strong_and_weak()
    table = ddim(LINEAR, timesteps.uniform(LINEAR, 25))
    guidance = Guidance(2.0, reference_fn=weak.apply_fn, reference_params=weak.params)
    shared = (table, jax.random.key(1), 2000, (1,))
    plain, guided = (
        np.asarray(diffusion.sample(*strong, *shared, prediction="v", guidance=g)) for g in (None, guidance)
    )
    assert guided.std() < 0.9 * plain.std()
    np.testing.assert_allclose(guided.mean(), 0.3, atol=0.02)


def test_a_network_guided_by_itself_is_unguided():
    strong, _ = strong_and_weak()
    table = ddim(LINEAR, TAU)
    guidance = Guidance(4.0, reference_fn=strong.apply_fn, reference_params=strong.params)
    shared = (table, jax.random.key(1), 5, (3,))
    got = diffusion.sample(*strong, *shared, prediction="v", guidance=guidance)
    np.testing.assert_allclose(got, diffusion.sample(*strong, *shared, prediction="v"), rtol=1e-9, atol=1e-12)


def test_the_second_network_is_told_the_condition_or_the_null():
    seen = []

    def spy(params, x, t, cond):
        jax.debug.callback(lambda c: seen.append(np.asarray(c)), cond)
        return network(params, x, t, cond)

    for null, wanted in ((None, COND), (NULL, NULL)):
        seen.clear()
        draw(Guidance(2.0, null, reference_fn=spy, reference_params=0.5))
        jax.effects_barrier()
        assert len(seen) == 5
        np.testing.assert_array_equal(seen[0], wanted)


# What is refused


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Guidance(2.0, NULL, rule="agp"), "guidance_rule is 'agp'; did you mean 'apg'"),
        (Guidance(1.0, NULL, rule="agp"), "did you mean 'apg'"),
        (Guidance(2.0, NULL, rule="apg:mometum=0"), "did you mean 'momentum'"),
        (Guidance(2.0, NULL, rule="cfg:eta=0"), "it has no options"),
        (Guidance(2.0, NULL, rule="apg:norm=-1"), "norm of guidance rule apg is -1"),
        (Guidance(2.0, NULL, rule="apg:momentum=1"), "momentum of guidance rule apg is 1"),
        (Guidance(2.0, NULL, rule="cfg_zero:zero_init=-1"), "zero_init of guidance rule cfg_zero is -1"),
        (Guidance(2.0, NULL, interval=(9, 3)), "guidance_interval"),
        (Guidance(2.0, NULL, interval=(1,)), "guidance_interval is"),
        (Guidance(2.0, NULL, interval=5), "guidance_interval is 5; give"),
        (Guidance(2.0, NULL, interval=(60, 90)), "holds none of this sampler's times, 2 to 50"),
        (Guidance(np.nan, NULL), "guidance_scale is nan .*must be finite"),
        (Guidance(2.0, NULL, rescale=np.nan), "must be finite"),
        (Guidance(2.0, NULL, rule="apg:eta=nan"), "eta of guidance rule apg is nan"),
        (Guidance(2.0, NULL, reference_params=1.0), "reference_params without a reference_fn"),
        ({"scale": 2.0}, "guidance is dict; give a diffusion.Guidance"),
        (Guidance(2.0, NULL, rescale=1.5), "guidance_rescale is 1.5"),
        (Guidance(2.0), "give cond and null_cond"),
        (Guidance(2.0, NULL[:2]), "differ in structure or shape"),
        (Guidance(np.ones(3) * 2, NULL), "scale has 3 numbers; this table makes 5 network calls"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(guidance, message):
    with refused(message):
        draw(guidance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", ["none", "recompute", "keep_eps"])
def test_outside_its_interval_every_rule_is_no_guidance(rule, clip):
    """In the first call only; from the state after it the paths are those of the same table without that call."""
    options = {"clip": clip, "return_trajectory": True}
    _, plain = diffusion.sample(network, 0.7, ddim(LINEAR, TAU), jax.random.key(0), 3, SHAPE, cond=COND, **options)
    given = Guidance(2.5, NULL, (2, 20), rule=rule)
    _, guided = diffusion.sample(
        network, 0.7, ddim(LINEAR, TAU), jax.random.key(0), 3, SHAPE, cond=COND, guidance=given, **options
    )
    np.testing.assert_allclose(guided.x[:4], plain.x[:4], rtol=1e-12, atol=1e-13)  # up to t = 21, 9 is inside
    assert np.max(np.abs(guided.x[-1] - plain.x[-1])) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite_where_both_outputs_agree_or_are_constant(rule):
    """As in a network whose last layer still is zero."""

    def mean(scale, slope):
        guidance = Guidance(scale, jnp.asarray(COND), rescale=0.5, rule=rule)
        flat = lambda params, x, t, cond: 0 * params * x  # noqa: E731
        options = {"cond": jnp.asarray(COND), "guidance": guidance}
        return jnp.mean(diffusion.sample(flat, slope, ddim(LINEAR, TAU), jax.random.key(0), 3, SHAPE, **options))

    for part in jax.grad(mean, (0, 1))(2.0, 0.7):
        assert np.isfinite(part)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_a_function_of_a_pair(rule):
    """What extends the library is called like this: no state, no schedule, any shape."""
    rng = np.random.default_rng(0)
    output, reference = jnp.asarray(rng.normal(size=(2, 4, 3, 2, 1)))
    pair = Pair(output, reference, lambda o: 0.5 - 2 * o, jnp.asarray(-2.0), jnp.asarray(3), jnp.zeros_like(output))
    guided = RULES[rule](pair, jnp.asarray(2.0))
    assert guided.output.shape == output.shape
    assert guided.memory is None or guided.memory.shape == output.shape
