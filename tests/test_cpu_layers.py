"""Laws of what serves a CPU alone: equal to its plain twin in value and in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffusion.models import cpu
from diffusion.models.layers import Conv

SHAPES = [((6, 5, 7, 4), 6), ((1, 1, 1, 3), 2), ((3, 8, 8, 2), 5), ((2, 2, 9, 1), 1), ((5, 4, 4, 3), 3)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def operands(shape, features, size=3):
    rng = np.random.default_rng(0)
    sizes = shape, (size, size, shape[-1], features), (*shape[:-1], features)
    return [jnp.asarray(rng.normal(0, 1, s)) for s in sizes]


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b)


def loss(convolve, weight):
    return lambda x, kernel: jnp.sum(weight * jnp.sin(convolve(x, kernel)))


@pytest.mark.parametrize(("shape", "features"), SHAPES, ids=str)
@pytest.mark.parametrize("pixels", [1, 64, 2048])
def test_a_convolution_in_blocks_and_its_transpose_are_those_of_the_plain_one(shape, features, pixels, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_PIXELS", pixels)
    x, kernel, weight = operands(shape, features)
    for a, b in zip(
        jax.vjp(lambda k: cpu.convolve_in_blocks(x, k), kernel),
        jax.vjp(lambda k: cpu.convolve(x, k), kernel),
        strict=True,
    ):
        assert_close(a(weight) if callable(a) else a, b(weight) if callable(b) else b)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_order_and_mode_of_derivative_is_that_of_the_plain_convolution(size):
    x, kernel, weight = operands((4, 5, 7, 2), 3, size)

    def derivatives(convolve):
        f = loss(convolve, weight)
        gradient = jax.grad(f, argnums=(0, 1))
        return (
            gradient(x, kernel),
            jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.cos(kernel))),
            jax.jvp(lambda x: f(x, kernel), (x,), (jnp.cos(x),)),
            jax.jvp(gradient, (x, kernel), (jnp.cos(x), jnp.cos(kernel))),
            jax.grad(lambda k: jnp.sum(jax.grad(f, 1)(x, k) ** 2))(kernel),
        )

    assert_close(derivatives(cpu.convolve_for_training), derivatives(cpu.convolve))


def test_gradients_of_single_samples_by_vmap_are_those_of_the_plain_convolution():
    x, kernel, weight = operands((4, 5, 7, 2), 3)

    def of_samples(convolve):
        gradient = jax.grad(lambda k, x, w: loss(convolve, w[None])(x[None], k))
        return jax.jit(jax.vmap(gradient, (None, 0, 0)))(kernel, x, weight)

    assert_close(of_samples(cpu.convolve_for_training), of_samples(cpu.convolve))


def test_other_platforms_get_the_plain_convolution():
    """What is lowered for a GPU has no loop and no more than the three convolutions of a gradient."""
    x, kernel, weight = operands((4, 8, 8, 2), 3)
    gradient = jax.jit(jax.grad(loss(cpu.convolve_for_training, weight), argnums=(0, 1)))
    text = {p: gradient.trace(x, kernel).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert "dot_general" in text["cpu"]
    for other in ("cuda", "tpu"):
        assert text[other].count("stablehlo.convolution") == 3
        assert "dot_general" not in text[other]
        assert "stablehlo.while" not in text[other]


@pytest.mark.parametrize(
    ("kernel", "stride", "image"), [(3, 1, (5, 7)), (3, 2, (5, 8)), (3, 2, (8, 8)), (1, 1, (4, 3)), (2, 2, (7, 5))]
)
def test_conv_is_flaxs_conv_with_the_same_parameters_and_gradient(kernel, stride, image):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (3, *image, 2)))
    init = nn.initializers.lecun_normal()
    ours = Conv(4, kernel=kernel, stride=stride, dtype=jnp.float64, kernel_init=init)
    theirs = nn.Conv(4, (kernel, kernel), (stride, stride), dtype=jnp.float64, kernel_init=init)
    params = ours.init(jax.random.key(3), x)
    assert_close(params, theirs.init(jax.random.key(3), x))

    def both(module):
        return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(module.apply(p, x))), argnums=(0, 1))(params, x)

    assert_close(both(ours), both(theirs))
