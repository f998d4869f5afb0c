"""Laws of a trained model in another precision."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from flax import linen as nn
from reference import refused

from diffusion import keys, machine, pretrained
from diffusion.evaluation import load_samples
from diffusion.models.layers import Dense, in_turn
from diffusion.precision import dtype_of, holds, in_dtype


@pytest.fixture(scope="module")
def digits():
    return pretrained.load("digits")


def test_bfloat16_halves_the_matrices_and_errs_by_its_rounding(digits):
    half = in_dtype(digits, "bfloat16")
    for leaf in jax.tree.leaves(half.params):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32)
    x = np.random.default_rng(0).normal(size=(16, *digits.model.image_shape)).astype(np.float32)
    t = np.linspace(1, 1000, 16, dtype=np.float32)
    full, found = (jax.jit(one.model.apply_fn)(one.params, x, t) for one in (digits, half))
    assert found.dtype == jnp.float32
    # Eight bits of a number are kept, so a layer errs by up to 2^-9 of it; a few dozen layers add up.
    error = np.sqrt(np.mean((found - full) ** 2) / np.mean(full**2))
    assert 2**-12 < error < 2**-4
    assert (dtype_of(digits), dtype_of(half)) == ("float32", "bfloat16")
    assert in_dtype(half, "float32").model.apply_fn is digits.model.apply_fn
    trained_so = half._replace(params=digits.params)  # arithmetic in bfloat16, parameters in float32
    assert [holds(each, "bfloat16") for each in (digits, half, trained_so)] == [False, True, False]
    assert half.model.split is not None


def test_kernels_in_half_precision_are_widened_one_after_another():
    """And not all at once, for which the memory would have to be three times as large."""
    depth, width = 24, 256
    layers = nn.Sequential([Dense(width, dtype=jnp.bfloat16, use_bias=False) for _ in range(depth)])
    x = jnp.ones((1, width))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layers.init(keys.make(0), x))

    def loop(params, x):
        return jax.lax.scan(lambda h, _: (layers.apply(params, h).astype(jnp.float32), None), x, None, length=3)[0]

    taken = jax.jit(loop).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    if jax.default_backend() == "cpu":
        assert taken < 0.7 * depth * width**2 * 4
    # What is computed is the same, and so are derivatives.
    kernel = params["params"]["layers_0"]["kernel"]
    for first in (1.0, -np.inf, np.inf, np.nan):
        np.testing.assert_array_equal(jax.jit(in_turn)(x.at[0, 0].set(first), kernel), kernel)
    plain, ours = (
        jax.value_and_grad(lambda kernel, x, f=f: (x @ f(x, kernel).astype(jnp.float32)).sum(), (0, 1))(kernel, x)
        for f in (lambda x, kernel: kernel, in_turn)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_a_network_of_ones_own_has_a_dtype_of_its_own(digits):
    config = digits.config.copy_and_resolve_references()
    config.network = "mine:net"
    with refused("the network mine:net is your own"):
        in_dtype(digits._replace(config=config), "bfloat16")
    with refused("dtype is 'bflaot16'; did you mean 'bfloat16'"):
        in_dtype(digits, "bflaot16")


def test_a_processor_says_whether_it_computes_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpuinfo")
    assert machine.computes_bfloat16() is None
    for text, has in (("flags : avx2 avx512_bf16", True), ("Features : asimd bf16", True), ("flags : avx512f", False)):
        (tmp_path / "cpuinfo").write_text(text)
        assert machine.computes_bfloat16() is has


def test_the_program_samples_any_model_in_bfloat16(digits, tmp_path, compile_once):
    for name in ("float32", "bfloat16"):
        args = ("--workdir=shipped", "--steps=5", "--sampler=learned", "--num=8", f"--out={name}", f"--dtype={name}")
        done = run("sample.py", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "was learned" not in done.stdout  # for these weights, however they are rounded
        assert json.loads((tmp_path / name / "sampling.json").read_text())["config"]["model"]["dtype"] == name
    full, half = (load_samples(tmp_path / name).images.astype(int) for name in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).mean() < 8  # of 255
    weaker = ("--guidance_model=shipped", "--guidance_scale=2", "--dtype=bfloat16", "--num=2", "--steps=2")
    done = run("sample.py", "--workdir=shipped", *weaker, cwd=tmp_path)
    assert done.returncode == 2
    assert "--guidance_model is the model itself" in done.stderr
