"""Laws of the transformer; tests/agreement compares it with diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

from diffusion.models import Transformer, as_apply_fn
from diffusion.models.transformer import positions

pytestmark = pytest.mark.usefixtures("hardly_optimized")

SMALL = {"width": 16, "depth": 2, "num_heads": 2}


def random_params(model, image, seed=0):
    """Random values for all parameters, also for those that start at zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)), jnp.ones(1))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype), shapes)


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_dits_networks_have_their_published_number_of_parameters():
    """33, 130, 458 and 675 million in table 1 of arXiv:2212.09748; the fixed positions are no parameters here."""
    sizes = {33: (384, 12, 6), 130: (768, 12, 12), 458: (1024, 24, 16), 675: (1152, 28, 16)}
    for millions, (width, depth, heads) in sizes.items():
        model = Transformer(out_channels=8, num_classes=1000, width=width, depth=depth, num_heads=heads)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.ones(1))["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(millions * 1e6, rel=0.015)


def test_an_untrained_network_predicts_zero():
    model = Transformer(**SMALL)
    x = normal((2, 4, 4, 3))
    params = model.init(jax.random.key(1), x, jnp.ones(2))["params"]
    assert not np.any(as_apply_fn(model)(params, x, jnp.ones(2)))


@pytest.mark.parametrize("options", [{"remat": "full"}, {"dropout": 0.5}, {"dtype": "bfloat16"}])
def test_what_only_concerns_training_or_precision_changes_no_prediction(options):
    model, image = Transformer(**SMALL), (4, 6, 2)
    params, x, t = random_params(model, image), normal((2, *image)), jnp.array([3.0, 900.0])
    plain = as_apply_fn(model)(params, x, t)
    other = as_apply_fn(Transformer(**SMALL, **options))(params, x, t)
    assert other.dtype == jnp.float32
    assert np.std(plain) > 0.05
    np.testing.assert_allclose(other, plain, atol=0.1 * np.abs(plain).max() if "dtype" in options else 1e-5)


def test_dropout_of_a_sample_depends_on_its_own_key_and_on_no_other():
    model, image = Transformer(**SMALL, dropout=0.5), (4, 4, 1)
    params, x, t = random_params(model, image), normal((3, *image)), jnp.full(3, 5.0)
    keys = jax.random.split(jax.random.key(2), 3)
    network = as_apply_fn(model)
    whole = network(params, x, t, dropout_keys=keys)
    np.testing.assert_allclose(whole[1:2], network(params, x[1:2], t[1:2], dropout_keys=keys[1:2]), atol=1e-5)
    assert np.abs(whole - network(params, x, t)).max() > 1e-3


def test_normalised_queries_and_keys_do_not_depend_on_their_size():
    image = (4, 4, 1)
    for qk_norm in (True, False):
        model = Transformer(**SMALL, qk_norm=qk_norm)
        params, x, t = random_params(model, image), normal((2, *image)), jnp.ones(2)
        before = as_apply_fn(model)(params, x, t)
        for name in ("kernel", "bias"):
            params["block_0"]["query"][name] *= 3
        after = as_apply_fn(model)(params, x, t)
        assert (np.abs(after - before).max() < 1e-4) == qk_norm


def test_no_class_is_the_last_row_of_the_embedding():
    model, image = Transformer(**SMALL, num_classes=3), (4, 4, 1)
    params, x, t = random_params(model, image), normal((2, *image)), jnp.ones(2)
    network = as_apply_fn(model)
    np.testing.assert_array_equal(network(params, x, t, None), network(params, x, t, jnp.full(2, 3)))
    assert np.abs(network(params, x, t, jnp.array([0, 0])) - network(params, x, t, None)).max() > 1e-3


def test_without_their_places_patches_would_be_exchangeable():
    """Attention treats all patches alike, so only the positions tell a shifted image apart."""
    model, image = Transformer(**SMALL), (4, 4, 1)
    params, x, t = random_params(model, image), normal((1, *image)), jnp.ones(1)
    network = as_apply_fn(model)
    shifted = network(params, jnp.roll(x, 2, axis=2), t)
    assert np.abs(shifted - jnp.roll(network(params, x, t), 2, axis=2)).max() > 1e-3
    table = positions(3, 5, 16).reshape(3, 5, 2, 8)
    assert np.all(table[:, :, 0] == table[:1, :, 0])  # the first half tells the column
    assert np.all(table[:, :, 1] == table[:, :1, 1])  # and the second the row
    np.testing.assert_allclose(table[2, 3, 0, [0, 4]], [np.sin(3), np.cos(3)], atol=1e-6)
    np.testing.assert_allclose(table[2, 3, 1, [0, 4]], [np.sin(2), np.cos(2)], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "image", "sentence"),
    [
        ({"width": 18}, (4, 4, 1), "width is 18; it must be a multiple of 4 and of 2 heads"),
        ({"patch": 3}, (4, 4, 1), "samples of 4x4 cannot be cut into patches of 3"),
        ({"depth": 0}, (4, 4, 1), "transformer.depth is 0"),
        ({"dtype": "half"}, (4, 4, 1), "transformer.dtype is 'half'; valid: float32, bfloat16"),
        ({"dropout": 1.0}, (4, 4, 1), "transformer.dropout is 1"),
        ({"mlp_ratio": 0.0}, (4, 4, 1), "transformer.mlp_ratio is 0"),
    ],
)
def test_a_network_that_cannot_be_is_refused(fields, image, sentence):
    model = Transformer(**{**SMALL, **fields})
    with refused(sentence):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)), jnp.ones(1))
