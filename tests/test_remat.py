"""Laws of what the backward pass computes again: the gradients stay, and fewer numbers are kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

from diffusion.models import Transformer, UNet, as_apply_fn

NETWORKS = {
    "unet": lambda remat: UNet(8, (1,), 1, (8,), dropout=0.2, remat=remat),
    "transformer": lambda remat: Transformer(width=16, depth=2, num_heads=2, dropout=0.2, remat=remat),
}
IMAGE = (8, 8, 1)
GIVEN = (jnp.ones((2, *IMAGE)), jnp.array([3.0, 900.0]), jax.random.split(jax.random.key(0), 2))

every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def random_params(model):
    """Random values for all parameters, also for those that start at zero."""
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *IMAGE)), jnp.ones(1))["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype), shapes)


def loss(model):
    def loss(params, x, t, keys):
        return jnp.mean(as_apply_fn(model)(params, x, t, dropout_keys=keys) ** 2)

    return loss


def kept(model, params):
    """How many numbers are kept for the backward pass, parameters that it needs among them."""
    pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(model)(p, *GIVEN), params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))


@every_network
def test_every_policy_has_the_same_parameters_and_gradients(make):
    params = random_params(make("none"))
    exact = jax.jit(jax.grad(loss(make("none"))))(params, *GIVEN)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(exact))
    assert largest > 0
    for remat in ("products", "full"):
        again = jax.jit(jax.grad(loss(make(remat))))(params, *GIVEN)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), exact, again)


@every_network
def test_products_keep_less_than_everything_and_full_keeps_the_least(make):
    params = random_params(make("none"))
    full, products, none = (kept(make(remat), params) for remat in ("full", "products", "none"))
    assert full < products < none


@every_network
def test_only_full_computes_convolutions_and_dense_layers_again(make):
    params = random_params(make("none"))

    def products(remat):
        program = str(jax.make_jaxpr(jax.grad(loss(make(remat))))(params, *GIVEN))
        # A product of matrices without an axis of batches; those with one are attention's, whose weights are not kept.
        return program.count("conv_general_dilated[") + program.count("([], [])")

    assert products("none") == products("products") < products("full")


@every_network
def test_true_and_false_are_full_and_none_as_in_earlier_versions(make):
    params = random_params(make("none"))

    def program(remat):
        return str(jax.make_jaxpr(loss(make(remat)))(params, *GIVEN))

    assert program(True) == program("full")
    assert program(False) == program("none")


@every_network
def test_an_unknown_policy_is_refused(make):
    with refused("remat is 'ful'; did you mean 'full'"):
        random_params(make("ful"))
