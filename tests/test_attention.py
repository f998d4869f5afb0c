"""Attention by the formula for a CPU: the same values and derivatives as jax's own, forward, reverse and both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffusion.models.attention import attend

SHAPES = {"one head": (2, 16, 16, 1, 8), "heads": (3, 9, 9, 4, 5), "another length": (2, 6, 11, 2, 4)}


def inputs(shape, dtype=np.float32, scale=1.0):
    batch, queries, keys, heads, features = shape
    rng = np.random.default_rng(0)
    sizes = [(batch, n, heads, features) for n in (queries, keys, keys)]
    return [jnp.asarray(scale * rng.standard_normal(size), dtype) for size in sizes]


def textbook(query, key, value):
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), value)


@pytest.fixture(autouse=True)
def on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator uses jax's own")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_textbook_and_of_jax(shape):
    args = inputs(shape)
    ahead = jnp.cos(jnp.arange(args[0].size, dtype=jnp.float32)).reshape(args[0].shape)
    for other in (textbook, jax.nn.dot_product_attention):
        found, back = jax.vjp(attend, *args)
        wanted, wanted_back = jax.vjp(other, *args)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        for gradient, expected in zip(back(ahead), wanted_back(ahead), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=3e-6)


def test_derivatives_of_first_and_second_order_are_numerical_ones():
    with jax.enable_x64(True):
        args = inputs((2, 3, 5, 2, 3), np.float64)
        check_grads(attend, args, order=2, modes=("fwd", "rev"))


def test_a_derivative_along_a_line_has_the_gradient_that_the_textbook_gives():
    """MeanFlow's loss: reverse over forward."""
    query, key, value = inputs(SHAPES["heads"])

    def loss(formula, query):
        return jnp.square(jax.jvp(lambda q: formula(q, key, value), (query,), (jnp.sin(query),))[1]).sum()

    found, wanted = (jax.grad(lambda q, f=f: loss(f, q))(query) for f in (attend, textbook))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_scores_of_hundreds_do_not_overflow():
    args = inputs(SHAPES["heads"], scale=60.0)
    assert float(jnp.abs(jnp.einsum("bnhd,bmhd->bhnm", *args[:2])).max()) > 1e4
    np.testing.assert_allclose(attend(*args), textbook(*args), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(g).all() for g in jax.grad(lambda *a: attend(*a).sum(), argnums=(0, 1, 2))(*args))


def test_the_transpose_keeps_one_array_of_the_size_of_the_weights():
    batch, queries, keys, heads, _ = shape = SHAPES["heads"]
    _, back = jax.vjp(attend, *inputs(shape))
    kept = [x.shape for x in jax.tree.leaves(back) if getattr(x, "size", 0) == batch * heads * queries * keys]
    assert kept == [(batch * heads, queries, keys)]
