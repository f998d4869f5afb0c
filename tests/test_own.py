"""Laws of networks and samplers of one's own: taken as they are, checked before the work, imported only if named."""

import json
import re
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, TINY, error_line, run
from flax import linen as nn
from flax import nnx

from configs import digits
from diffusion import options, schedules, solvers, timesteps
from diffusion.commands import samplers
from diffusion.errors import InputError
from diffusion.model import Trained, make_model
from diffusion.models import adapt
from diffusion.pretrained import weights

SHAPE = (8, 8, 2)
X = jax.random.normal(jax.random.key(1), (4, *SHAPE))
T, LABELS = jnp.array([1.0, 20.5, 300.0, 1000.0]), jnp.array([0, 1, 2, 3])


def fresh():
    """The same key, which nobody has used yet."""
    return jax.random.key(3)


class Layers(nnx.Module):
    """A list of layers, whose numbers are keys, and dropout, whose random state is no parameter."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(2, 2, (3, 3), rngs=rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

    def __call__(self, x, t, cond):
        for layer in self.layers:
            x = self.dropout(jnp.tanh(layer(x))) * jnp.log(t + 1)[:, None, None, None]
        return x


class Conditional(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond):
        return nn.Conv(2, (3, 3))(x) + nn.Embed(4, 2)(cond)[:, None, None]


def linen(module=Conditional()):  # noqa: B008
    init = lambda key: module.init(key, X, T, LABELS)["params"]  # noqa: E731
    return init, lambda params, *inputs: module.apply({"params": params}, *inputs)


def split(key):
    return nnx.split(Layers(nnx.Rngs(key)), nnx.Param, ...)


def of_nnx():
    graph, _, rest = split(fresh())
    return lambda key: split(key)[1], lambda params, *inputs: nnx.merge(graph, params, rest)(*inputs)


def plain():
    def init(key):
        return [(jax.random.normal(key, SHAPE), {"a": jnp.ones(())}), jnp.zeros(2)]

    return init, lambda params, x, t, cond: x * params[0][0][None] * params[0][1]["a"] + params[1][None, None, None]


@pytest.mark.parametrize(("parts", "classes"), [(linen, 3), (of_nnx, 0), (plain, 0)])
def test_an_own_network_computes_what_it_computes_by_itself_also_from_a_file(parts, classes):
    init, apply = parts()
    network = adapt(init, apply, SHAPE, num_classes=classes)
    params = jax.jit(network.init)(fresh())
    # Files keep parameters by the path of each.
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    params = flax.traverse_util.unflatten_dict(dict(sorted(flat.items(), reverse=True)), sep="/")
    wanted = apply(init(fresh()), X, T, LABELS if classes else None)
    np.testing.assert_allclose(network.apply_fn(params, X, T, LABELS if classes else None), wanted, atol=1e-6)
    assert len(flat) == len(jax.tree.leaves(init(fresh())))
    grads = jax.grad(lambda p: (network.apply_fn(p, X, T, LABELS if classes else None) ** 2).sum())(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.usefixtures("float64")
def test_parameters_and_predictions_are_float32_also_in_double_precision():
    network = adapt(lambda key: {"a": jax.random.normal(key), "b": jnp.ones(2, jnp.bfloat16)}, same, SHAPE)
    params = network.init(fresh())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert network.apply_fn(params, X, np.float64(T)).dtype == jnp.float32


def test_without_a_label_an_own_network_is_told_no_class():
    init, apply = linen()
    network = adapt(init, apply, SHAPE, num_classes=3)
    found = network.apply_fn(network.init(fresh()), X, T)
    np.testing.assert_allclose(found, apply(init(fresh()), X, T, jnp.full(4, 3)), atol=1e-6)


def test_only_a_network_that_takes_dropout_keys_is_given_them():
    keys = jax.random.split(fresh(), 4)
    for takes in (False, True):

        def silent(params, x, t, cond):
            return x * params["a"]

        def noisy(params, x, t, cond, dropout_keys=None):
            noise = 0 if dropout_keys is None else jax.vmap(lambda k: jax.random.normal(k, SHAPE))(dropout_keys)
            return x * params["a"] + noise

        network = adapt(lambda key: {"a": jnp.ones(())}, noisy if takes else silent, SHAPE)
        params = network.init(fresh())
        moved = network.apply_fn(params, X, T, dropout_keys=keys) - network.apply_fn(params, X, T)
        assert (np.abs(moved).max() > 0) == takes


def one(key):
    return {"a": jnp.ones(())}


def same(params, x, t, cond):
    return x * params["a"]


UNFIT = [
    (lambda key: {}, same, "init returns no arrays"),
    (lambda key: {"a": jnp.ones((), int)}, same, r"init returns int32 at \['a'\]; it must return floating"),
    (lambda key: {"a": "text"}, same, "init fails with TypeError"),
    (lambda key: {"a": {"b": jnp.ones(())}, "a/b": jnp.ones(())}, same, "two arrays of init have one name"),
    (lambda: {}, same, "init fails with TypeError"),
    (one, lambda params, x, t: x, r"apply takes \(params, x, t\); it must take \(params, x, t, cond\)"),
    (one, 3, "it is no function"),
    (one, lambda p, x, t, cond: x[..., :1], r"returns float32 \(2, 8, 8, 1\) .* float \(2, 8, 8, 2\)"),
    (one, lambda p, x, t, cond: x[:1], r"returns float32 \(1, 8, 8, 2\)"),
    (one, lambda p, x, t, cond: x > 0, r"returns bool"),
    (one, lambda p, x, t, cond: (x, x), "returns a tuple"),
    (one, lambda p, x, t, cond: x + cond[:, None], r"apply fails with TypeError: .*\(test_own.py, line \d+\)"),
]


@pytest.mark.parametrize(("init", "apply", "message"), UNFIT)
def test_a_network_that_does_not_fit_is_refused_in_one_line(init, apply, message):
    with pytest.raises(InputError, match=message) as caught:
        adapt(init, apply, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_model_is_made_of_an_own_network_only_where_its_function_is_given():
    config = digits.get_config()
    config.network = "mine:net:scale=2"

    def net(image_shape, out_channels, num_classes, scale: float = 1.0):
        return lambda key: {"a": jnp.full((), scale)}, same

    model = make_model(config, (8, 8, 1), networks={"mine:net": net})
    assert float(model.init(fresh())["a"]) == 2
    with pytest.raises(InputError, match="mine:net, Python code that does not come with it"):
        make_model(config, (8, 8, 1))
    wrong = {
        "mine:net:sclae=2": "did you mean 'scale'",
        "mine:net:scale": "write mine:net:scale=VALUE",
        "mine": "it must be unet, transformer, unet2d, or your own",
    }
    for config.network, message in wrong.items():
        with pytest.raises(InputError, match=message):
            make_model(config, (8, 8, 1), networks={"mine:net": net})
    config.network = "mine:net"
    for function, message in (
        (lambda image_shape: None, "must take"),
        (lambda *_: 3, "must take"),
        (swap, "tuple|two"),
    ):
        with pytest.raises(InputError, match=message):
            make_model(config, (8, 8, 1), networks={"mine:net": function})


def swap(image_shape, out_channels, num_classes):
    return one


def test_an_own_name_is_told_from_options():
    own = {"a:f": "a:f", "a.b_1:f:x=1,y=2": "a.b_1:f", "a:f:": "a:f"}
    others = ["ddim", "ddim:eta=0", "sections:10,15", "mine.json", "a:1f", "a:f,b:g", "a: f", "", ":f", "a::f"]
    assert {text: options.own_name(text) for text in own} == own
    assert not any(map(options.own_name, others))


MINE = (
    re.search(r"^```python\n(.*?)^```", (ROOT / "docs/own.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    + """
from pathlib import Path
Path("imported").touch()

import dataclasses
from diffusion import schedules, solvers

def sampler(schedule, tau, eta: float = 0.0):
    return solvers.ddim(schedule, tau, eta)

def nothing(schedule, tau):
    return None

def other(schedule, tau):
    return solvers.ddim(schedules.cosine(), tau)

def unsound(schedule, tau):
    table = solvers.ddim(schedule, tau)
    return dataclasses.replace(table, update=table.update * float("nan"))

def broken(schedule, tau):
    return tau["a"]

def backwards(schedule, tau):
    return solvers.ddim(schedule, tau).reverse()
"""
)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder of a module of the user's own, which leaves a file when it is imported, as the current one."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("module")
def test_an_own_sampler_makes_its_table_or_is_refused():
    schedule = schedules.linear()

    def table(sampler, **given):
        return samplers.make_table(schedule, sampler, 5, "uniform", **given)

    wanted = solvers.ddim(schedule, timesteps.uniform(schedule, 5), 0.5).update
    np.testing.assert_array_equal(table("mine:sampler:eta=0.5").update, wanted)
    np.testing.assert_array_equal(table("mine:sampler", eta=0.5).update, wanted)
    assert samplers.default_eta("mine:sampler") == 0
    wrong = {
        "mine:sampler:eat=1": "did you mean 'eta'",
        "mine:smapler": "did you mean 'sampler'",
        "mine:nothing": "returns a NoneType; it must return a SamplerTable",
        "mine:other": "another noise schedule",
        "mine:unsound": "not finite",
        "mine:broken": r"fails with IndexError: .*\(mine.py, line \d+\)",
        "mine:backwards": "from images to noise",
        "mine:one": "has no function 'one'",
        "mien:sampler": "there is no module mien",
    }
    for sampler, message in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            table(sampler)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("compile_once")
def test_a_run_with_an_own_network_is_used_by_who_names_it_and_runs_no_code_for_others(module):
    mark, width = module / "imported", ("--network=mine:net:width=4",)
    args = [arg for arg in TINY if "config.model" not in arg] + ["--config.train.num_steps=2"]
    done = run("train.py", *width, *args, cwd=module)
    assert done.returncode == 0, done.stderr
    assert "--network=mine:net" in next(line for line in done.stdout.splitlines() if line.startswith("done: "))
    assert json.loads((module / "runs/digits/config.json").read_text())["network"] == "mine:net:width=4"
    # Nobody who does not name it imports it.
    mark.unlink()
    for script in ("sample.py", "convert.py", "evaluate.py"):
        assert "name it: --network=mine:net" in error_line(run(script, cwd=module))
    other = "config.network is 'unet', the run has 'mine:net:width=4'"
    assert other in error_line(run("train.py", *args, cwd=module))
    assert not mark.exists()
    # The same command goes on with it.
    longer = run("train.py", *width, *args, "--config.train.num_steps=3", cwd=module)
    assert "resuming runs/digits at step 2" in longer.stdout, longer.stderr
    # Who does gets what is drawn from the run also from its file.
    images = []
    assert run("convert.py", "--network=mine:net", "--out=file.safetensors", cwd=module).returncode == 0
    for workdir in ("runs/digits", "file.safetensors"):
        shared = ("--num=4", "--steps=2", "--network=mine:net", f"--workdir={workdir}", "--out=out")
        result = run("sample.py", *shared, "--sampler=mine:sampler:eta=1", cwd=module)
        assert result.returncode == 0, result.stderr
        images.append(np.load(module / "out" / "samples.npz")["samples"])
    np.testing.assert_array_equal(*images)
    assert mark.exists()
    record = json.loads((module / "out" / "sampling.json").read_text())
    assert record["sampler"] == "mine:sampler:eta=1"
    assert len(record["table_sha256"]) == 64
    # Other options than the run's are refused, and so is the same run with another network.
    wrong = error_line(run("sample.py", "--network=mine:net:width=8", cwd=module))
    assert "was trained with 'mine:net:width=4'; write --network=mine:net" in wrong
    assert "config.network is 'mine:net:width=8'" in error_line(
        run("train.py", "--network=mine:net:width=8", *args, cwd=module)
    )


@pytest.mark.usefixtures("compile_once")
def test_a_file_that_names_a_sampler_of_its_own_runs_no_code_until_the_user_names_it(module):
    config = digits.get_config()
    config.model.update(width=4, multipliers=(1,), num_blocks=1, attention_resolutions=(0,))
    model = make_model(config, (8, 8, 1))
    stored = (("sample.py", "sampler", "mine:sampler"), ("evaluate.py", "samplers", "ddim,mine:sampler"))
    for script, flag, sampler in stored:
        config.sample.sampler = sampler
        weights.save(module / "file.safetensors", Trained(model, model.init(fresh()), config, 1, "0.9"))
        line = error_line(run(script, "--workdir=file.safetensors", cwd=module))
        assert f"name it: --{flag}={sampler}" in line
        assert not (module / "imported").exists()
    result = run("sample.py", "--workdir=file.safetensors", "--sampler=mine:sampler", "--dry_run", cwd=module)
    assert result.returncode == 0, result.stderr
    assert (module / "imported").exists()
