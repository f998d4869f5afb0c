"""Laws of caching: deep features are kept from call to call inside the scan, whatever runs there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from jax.sharding import Mesh
from reference import refused
from trajectories import run_table

import diffusion
from diffusion import keys, pretrained, sampling, schedules, timesteps
from diffusion.caching import Cache, Split
from diffusion.commands import drawing
from diffusion.evaluation import load_samples
from diffusion.guidance import Guidance
from diffusion.models import Transformer, UNet, UNet2D, UNet2DCondition, as_apply_fn, as_split
from diffusion.solvers import ddim, ddpm, dpm_solver, dpm_solver_pp, unipc

LINEAR = schedules.linear(100, 1e-3, 0.1)
TAU = timesteps.uniform(LINEAR, 7)
COND, NULL = np.array([1.0, -0.6, 2.0]), np.array([0.1, 0.1, -0.2])
SHAPE = (4,)

TABLES = {
    "multistep": dpm_solver_pp(LINEAR, TAU, order=3),
    "predictor and corrector": unipc(LINEAR, TAU),
    "two calls a step": dpm_solver(LINEAR, TAU, order=2),
    "stochastic": ddim(LINEAR, TAU, eta=1.0),
}
every_table = pytest.mark.parametrize("name", TABLES)


# A network in closed form: its deep part is a tanh, and x, t and cond enter the rest as well.
def deep(params, x, t, cond):
    return {"deep": jnp.tanh(params * x + t[:, None] / 100 + (0.0 if cond is None else cond[:, None]))}


def shallow(params, x, t, cond, features):
    return 0.6 * features["deep"] + 0.4 * jnp.sin(x) - 0.001 * t[:, None]


def whole(params, x, t, cond):
    features = deep(params, x, t, cond)
    return shallow(params, x, t, cond, features), features


def plain(params, x, t, cond=None):
    return whole(params, x, t, cond)[0]


SPLIT = Split(whole, shallow)


def draw(table, cache=None, params=0.7, **options):
    options = {"cond": COND, "sample_ids": np.array([0, 1, 5]), **options}
    return np.asarray(diffusion.sample(plain, np.array(params), table, key(), 3, SHAPE, cache=cache, **options))


def key():
    return jax.random.key(3)


def noises(table):
    """The start and the noise of each stage."""
    each = [[jax.random.fold_in(jax.random.fold_in(key(), i), s) for i in (0, 1, 5)] for s in range(table.nfe + 1)]
    drawn = np.array([[jax.random.normal(k, SHAPE, np.float64) for k in row] for row in each])
    return np.hypot(table.signal[0], table.noise[0]) * drawn[0], drawn[1:]


def by_hand(table, numbers, answer):
    """A plain loop over the stages; answer(x, t, features) -> (eps, features) computes them where features is None."""
    times, kept = iter(enumerate(table.t)), [None]

    def denoiser(x, signal, noise):
        call, t = next(times)
        eps, kept[0] = answer(x, np.full(3, t), None if call in numbers else kept[0])
        return (x - noise * eps) / signal

    start, z = noises(table)
    return run_table(table, start, denoiser, z)


def one_network(params, cond):
    def answer(x, t, features):
        features = deep(params, x, t, cond) if features is None else features
        return np.asarray(shallow(params, x, t, cond, features)), features

    return answer


def two_networks(scale, first, second):
    def answer(x, t, features):
        kept = features or (None, None)
        (c, ours), (u, theirs) = first(x, t, kept[0]), second(x, t, kept[1])
        return u + scale * (c - u), (ours, theirs)

    return answer


@pytest.mark.usefixtures("float64")
@every_table
@pytest.mark.parametrize("calls", [2, 3, (0, 1, 4)], ids=str)
def test_the_scan_is_a_plain_loop_that_computes_the_deep_part_in_these_calls_only(name, calls):
    table = TABLES[name]
    numbers = range(0, table.nfe, calls) if isinstance(calls, int) else calls
    wanted = by_hand(table, numbers, one_network(0.7, COND))
    np.testing.assert_allclose(draw(table, Cache(SPLIT, calls)), wanted, rtol=1e-11, atol=1e-12)
    assert np.abs(wanted - draw(table)).max() > 1e-4  # and it is not the loop without a cache


@pytest.mark.usefixtures("float64")
@every_table
def test_guidance_keeps_the_features_of_both_answers(name):
    table = TABLES[name]
    answer = two_networks(3.0, one_network(0.7, COND), one_network(0.7, NULL))
    found = draw(table, Cache(SPLIT, 3), guidance=Guidance(3.0, NULL))
    np.testing.assert_allclose(found, by_hand(table, range(0, table.nfe, 3), answer), rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("float64")
def test_a_second_network_keeps_its_own_features():
    table = TABLES["multistep"]
    answer = two_networks(2.0, one_network(0.7, COND), one_network(0.2, COND))
    guidance = Guidance(2.0, reference_fn=plain, reference_params=np.array(0.2), reference_split=SPLIT)
    found = draw(table, Cache(SPLIT, 3), guidance=guidance)
    np.testing.assert_allclose(found, by_hand(table, range(0, table.nfe, 3), answer), rtol=1e-10, atol=1e-11)


def test_each_call_runs_one_branch():
    ran = []

    def told(kind, function):
        def network(params, x, t, cond, *features):
            jax.debug.callback(lambda t: ran.append((float(t[0]), kind)), t)
            return function(params, x, t, cond, *features)

        return network

    table = TABLES["multistep"]
    draw(table, Cache(Split(told("whole", whole), told("shallow", shallow)), 3)).sum()
    jax.effects_barrier()
    assert sorted(ran, reverse=True) == [
        (np.float32(t), "shallow" if i % 3 else "whole") for i, t in enumerate(table.t)
    ]


def test_all_calls_whole_are_no_cache_to_the_bit():
    table = TABLES["stochastic"]
    for calls in (1, range(table.nfe)):
        np.testing.assert_array_equal(draw(table, Cache(SPLIT, calls)), draw(table))


def test_another_list_compiles_nothing():
    table = TABLES["multistep"]
    draw(table, Cache(SPLIT, (0, 2, 4)))
    before = sampling._run._cache_size()
    draw(table, Cache(SPLIT, (0, 1, 5)))
    draw(table, Cache(SPLIT, 3))
    assert sampling._run._cache_size() == before


def carried(cache, **options):
    """The shapes that the one scan of a sampling run carries."""

    def scans(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation
            for value in equation.params.values():
                yield from scans(value.jaxpr) if hasattr(value, "jaxpr") else ()

    def run(params):
        options.update(cond=COND, cache=cache)
        return diffusion.sample(plain, params, TABLES["multistep"], key(), 3, SHAPE, **options)

    traced = jax.make_jaxpr(run)
    (scan,) = [s for s in scans(traced(0.7).jaxpr) if s.params["length"] == TABLES["multistep"].nfe]
    first = scan.params["num_consts"]
    return sorted(v.aval.shape for v in scan.invars[first : first + scan.params["num_carry"]])


def test_the_carry_grows_by_the_features_alone():
    assert carried(Cache(SPLIT, 2)) == sorted([*carried(None), (3, 4)])
    guided = {"guidance": Guidance(3.0, NULL)}
    assert carried(Cache(SPLIT, 2), **guided) == sorted([*carried(None, **guided), (6, 4)])
    assert carried(Cache(SPLIT, 1)) == carried(None)


# Networks.
NETWORKS = {
    "unet": UNet(width=8, multipliers=(1, 2, 2), num_blocks=1, attention_resolutions=(4,), num_classes=3),
    "transformer": Transformer(width=16, depth=6, num_heads=2, num_classes=3),
    "unet2d": UNet2D(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_classes=3,
    ),
    "unet2d with skips": UNet2D(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=4,
        num_classes=3,
    ),
    "unet2d_condition": UNet2DCondition(
        block_out_channels=(8, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=4,
        norm_num_groups=4,
    ),
}
FEATURES = {
    "unet": (2, 8, 8, 16),
    "transformer": (2, 16, 16),
    "unet2d": (2, 8, 8, 16),
    "unet2d_condition": (2, 8, 8, 32),
}
IMAGE = (8, 8, 3)


def random_params(network, seed=0):
    """Weights that are all random, also those that start at zero."""
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *IMAGE)), jnp.ones(1))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), like)


def told(network):
    texts = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    return texts if isinstance(network, UNet2DCondition) else np.array([0, 2])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_given_its_own_features_answers_as_before_with_less_work(name):
    network = NETWORKS[name]
    params, split, cond = random_params(network), as_split(network), told(network)
    x, t = np.random.default_rng(2).normal(size=(2, *IMAGE)).astype(np.float32), np.array([40.0, 7.0])
    prediction, features = jax.jit(split.whole)(params, x, t, cond)
    np.testing.assert_allclose(prediction, as_apply_fn(network)(params, x, t, cond), rtol=1e-4, atol=1e-4)
    short = jax.jit(split.shallow).lower(params, x, t, cond, features).compile()
    np.testing.assert_allclose(short(params, x, t, cond, features), prediction, rtol=1e-4, atol=1e-4)
    full = jax.jit(split.whole).lower(params, x, t, cond).compile()
    assert short.cost_analysis()["flops"] < 0.7 * full.cost_analysis()["flops"]
    if name in FEATURES:
        assert [leaf.shape for leaf in jax.tree.leaves(features)] == [FEATURES[name]]
    # Another x alters the features, and other features alter the answer.
    others = jax.jit(split.whole)(params, x + 1, t, cond)[1]
    assert np.abs(short(params, x, t, cond, others) - prediction).max() > 1e-3


@pytest.mark.parametrize("network", ["guided", "learned variance"])
def test_a_deep_part_that_is_constant_makes_caching_exact(network):
    learned = network == "learned variance"
    network = UNet(width=8, multipliers=(1, 1), num_blocks=0, num_classes=3, out_channels=6 if learned else 3)
    params = random_params(network)
    # The last layer of the deep part returns its bias, whatever x, t and cond.
    params["up_1_upsample"] = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 0 * leaf, params["up_1_upsample"])
    options = {"cond": np.array([0, 2]), "clip": "recompute"}
    options |= {} if learned else {"guidance": Guidance(3.0, np.full(2, 3), rule="apg")}
    table = ddpm(LINEAR, TAU, "learned") if learned else unipc(LINEAR, TAU)
    wanted, found = (
        diffusion.sample(as_apply_fn(network), params, table, key(), 2, IMAGE, cache=cache, **options)
        for cache in (None, Cache(as_split(network), 3))
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


def test_a_new_network_has_parameters_only_and_equal_networks_have_one_split():
    network = NETWORKS["transformer"]
    made = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *IMAGE)), jnp.ones(1))
    assert made.keys() == {"params"}
    assert as_split(UNet(multipliers=(1, 2))) is as_split(UNet(multipliers=[1, 2]))


@pytest.fixture(scope="module")
def digits():
    return pretrained.load("digits")


def test_a_split_batch_and_any_batch_size_draw_the_same_images(digits):
    model, params, *_ = digits
    table, cache = ddim(model.schedule, timesteps.uniform(model.schedule, 5)), Cache(model.split, 2)

    def drawn(devices, batch_size):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        options = {"seed": 0, "mesh": mesh, "batch_size": batch_size, "clip": "recompute", "cache": cache}
        return np.concatenate(list(drawing.generate(model, params, table, range(8), **options))).astype(int)

    wanted = drawn(1, 8)
    for found in (drawn(4, 8), drawn(1, 4)):
        assert np.abs(found - wanted).max() <= 1  # of 255


def test_the_program_draws_what_the_library_draws_and_records_it(digits, tmp_path, compile_once):
    args = ("--workdir=shipped", "--steps=7", "--num=4", "--out=out", "--batch_size=4")
    done = run("sample.py", *args, "--cache=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 network calls, 3 of them whole" in done.stdout
    assert json.loads((tmp_path / "out/sampling.json").read_text())["cache"] == [0, 3, 6]
    model, params, *_ = digits
    table = ddim(model.schedule, timesteps.uniform(model.schedule, 7))
    options = {"prediction": model.prediction, "clip": digits.clip, "cache": Cache(model.split, (0, 3, 6))}
    wanted = model.space.decode(
        diffusion.sample(model.apply_fn, params, table, keys.make(0), 4, model.image_shape, **options)
    )
    found = load_samples(tmp_path / "out").images
    assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1
    # Without the cache it is another job.
    again = run("sample.py", *args, cwd=tmp_path)
    assert "replaces the images of another job" in again.stdout
    assert "cache" not in json.loads((tmp_path / "out/sampling.json").read_text())


def test_what_cannot_be_is_refused():
    table, one = TABLES["multistep"], ddim(LINEAR, [100, 0])
    for calls, reason in (
        (0, "cache is 0; this table makes 7 calls, so give 1 to 7"),
        (-2, "cache is -2"),
        (8, "give 1 to 7"),
        ((), "begin with call 0"),
        ((1, 2), "the calls 1,2; name each once, in order, and begin with call 0"),
        ((0, 3, 2), "in order"),
        ((0, 0), "once"),
        ((0, 1.5), "the calls 0,1.5"),
        ((0, 7), "names call 7; the calls of this table are 0 to 6"),
        ("0,2", "calls of cache are '0,2'; give a whole number, or a list"),
        (2.0, "calls of cache are 2.0"),
        (True, "calls of cache are True"),
    ):
        with refused(reason):
            draw(table, Cache(SPLIT, calls))
    with refused("this table makes one; leave it out"):
        draw(one, Cache(SPLIT, 1))
    with refused("split of cache is a function; give Model.split"):
        draw(table, Cache(plain, 2))
    with refused("cache is a int; give diffusion.Cache"):
        draw(table, 3)
    with refused("has none to keep; leave it out, or take a UNet"):
        draw(table, Cache(None, 2))
    with refused("the second one, of the guidance, has none to keep"):
        draw(table, Cache(SPLIT, 2), guidance=Guidance(2.0, reference_fn=plain, reference_params=0.2))
