"""Laws of the UNet and its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import refused

from diffusion.models import UNet, as_apply_fn
from diffusion.models.layers import GroupNorm, ResidualBlock, sinusoidal_embedding

SMALL = {"width": 8, "multipliers": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}


TINY = {"width": 8, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": ()}


def key(seed=0):
    return jax.random.key(seed)


def normal(shape, seed=0):
    return jax.random.normal(key(seed), shape)


def shapes(model, image=(8, 8, 1), cond=None):
    """The parameters' shapes, without computing any."""
    return jax.eval_shape(model.init, key(), jnp.zeros((1, *image)), jnp.ones(1), cond)["params"]


def random_params(model, image=(8, 8, 1)):
    """Random values for all parameters, also for those that start at zero."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype), shapes(model, image))


def test_ddpms_cifar10_network_has_its_published_number_of_parameters():
    """35.7 M in the paper (appendix B); 35,746,307 in the authors' checkpoint."""
    tree = shapes(UNet(), (32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 35_746_307


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("image", "out_channels"), [((8, 8, 1), 0), ((8, 12, 3), 0), ((8, 8, 3), 6)])
def test_the_output_is_float32_in_the_shape_of_the_image(image, out_channels, dtype):
    model = UNet(**SMALL, dtype=dtype, out_channels=out_channels)
    params = shapes(model, image)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    out = jax.eval_shape(as_apply_fn(model), params, jnp.zeros((3, *image)), jnp.ones(3))
    assert out.shape == (3, *image[:2], out_channels or image[2])
    assert out.dtype == np.float32


def test_bfloat16_computes_the_same_function_to_its_precision():
    exact, rough = UNet(**TINY), UNet(**TINY, dtype="bfloat16")
    params, x, t = random_params(exact), normal((2, 4, 4, 1)), jnp.array([3.0, 900.0])
    a, b = (jax.jit(as_apply_fn(m))(params, x, t) for m in (exact, rough))
    assert np.std(a) > 0.05
    assert 0 < np.max(np.abs(a - b)) < 0.1 * np.max(np.abs(a))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 256), 32), ((2, 7, 128), 32), ((2, 4, 4, 128), 32), ((3, 6, 5, 96), 8), ((2, 3, 3, 16), 4)],
    ids=str,
)
def test_group_norm_is_flaxs_group_norm_with_the_same_gradient(shape, groups):
    channels = shape[-1]
    ours, theirs = GroupNorm(max_groups=groups), nn.GroupNorm(num_groups=groups)
    rng = np.random.default_rng(0)
    params = {"scale": rng.normal(1, 0.3, channels), "bias": rng.normal(0, 1, channels)}
    params, x, weight = jax.tree.map(jnp.float32, (params, rng.normal(0.5, 2, shape), rng.normal(0, 1, shape)))

    @jax.jit
    def both(params, x):
        def weighted(module):
            def loss(params, x):
                out = module.apply({"params": params}, x)
                return jnp.sum(weight * out), out

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

        return weighted(ours), weighted(theirs)

    ((_, out), gradients), ((_, their_out), their_gradients) = both(params, x)
    assert jax.tree.map(jnp.shape, gradients[0]) == {"scale": (channels,), "bias": (channels,)}
    np.testing.assert_allclose(out, their_out, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(their_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_group_norm_gives_groups_of_zero_mean_and_unit_variance():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 5, 5, 64)), jnp.float32)
    out = np.asarray(GroupNorm(max_groups=8).apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x))
    groups = out.reshape(2, 25, 8, 8)
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var(axis=(1, 3)), 1, atol=1e-4)


@pytest.mark.parametrize("features", [4, 32, 64, 128])
def test_a_residual_block_of_any_width_lets_the_time_through(features):
    """Time enters as a constant a channel; a norm with one channel a group would subtract it again."""
    block = ResidualBlock(features, 0.0, 0, jnp.float32)
    x, embeddings = jnp.ones((1, 2, 2, features)), jnp.stack([jnp.full((1, 4), -1.0), jnp.full((1, 4), 2.0)])
    tree = jax.eval_shape(block.init, key(), x, embeddings[0])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), tree)
    early, late = jax.jit(jax.vmap(lambda e: block.apply(params, x, e)))(embeddings)
    assert np.max(np.abs(early - late)) > 1e-2


def test_group_norm_of_a_constant_image_is_its_bias():
    params = {"params": {"scale": jnp.ones(32), "bias": jnp.linspace(-1, 1, 32)}}
    out = GroupNorm().apply(params, jnp.full((1, 4, 4, 32), 0.5))
    np.testing.assert_allclose(out, np.broadcast_to(np.linspace(-1, 1, 32), out.shape), atol=1e-3)


def test_the_sinusoidal_embedding_is_that_of_the_transformer():
    t = np.array([1.0, 37.5, 1000.0])
    frequencies = 10000.0 ** (-np.arange(16) / 15)
    wanted = np.concatenate([np.sin(t[:, None] * frequencies), np.cos(t[:, None] * frequencies)], axis=-1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(t), 32), wanted, atol=2e-4)
    np.testing.assert_array_equal(sinusoidal_embedding(jnp.array([5]), 32), sinusoidal_embedding(jnp.array([5.0]), 32))


def test_the_output_is_zero_at_initialisation():
    model = UNet(width=4, multipliers=(1,), num_blocks=0, attention_resolutions=())
    x, t = normal((2, 4, 4, 1)), jnp.ones(2)
    params = jax.jit(model.init)(key(), x, t)["params"]
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(params))
    assert np.all(jax.jit(as_apply_fn(model))(params, x, t) == 0)


def test_dropout_acts_in_training_alone():
    plain, dropped = UNet(**TINY), UNet(**TINY, dropout=0.5)
    params, x, t = random_params(plain), normal((2, 4, 4, 1)), jnp.array([10.0, 500.0])
    train = jax.jit(lambda k: as_apply_fn(dropped)(params, x, t, train=True, dropout_key=k))
    without = jax.jit(as_apply_fn(plain))(params, x, t)
    np.testing.assert_array_equal(jax.jit(as_apply_fn(dropped))(params, x, t), without)
    first, again, other = train(key(1)), train(key(1)), train(key(2))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3
    assert np.max(np.abs(first - without)) > 1e-3


def test_the_timestep_and_every_sample_reach_the_output_separately():
    model = UNet(**TINY)
    apply_fn = jax.jit(as_apply_fn(model))
    params, x = random_params(model), normal((2, 4, 4, 1))
    base = apply_fn(params, x, jnp.array([10.0, 500.0]))
    other_time = apply_fn(params, x, jnp.array([10.0, 600.0]))
    np.testing.assert_allclose(other_time[0], base[0], atol=1e-6)
    assert np.max(np.abs(other_time[1] - base[1])) > 1e-3
    other_image = apply_fn(params, x.at[0].add(1.0), jnp.array([10.0, 500.0]))
    np.testing.assert_allclose(other_image[1], base[1], atol=1e-6)
    assert np.max(np.abs(other_image[0] - base[0])) > 1e-3


def test_class_labels_change_the_output_and_none_is_the_null_class():
    model = UNet(**TINY, num_classes=3)
    apply_fn = jax.jit(as_apply_fn(model))
    params, x, t = random_params(model), normal((1, 4, 4, 1)), jnp.array([300.0])
    outputs = [apply_fn(params, x, t, jnp.array([label])) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(outputs[i] - outputs[j])) > 1e-3
    np.testing.assert_allclose(apply_fn(params, x, t, None), outputs[3], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 7, "width is 7"),
        ("width", 2, "width is 2"),
        ("width", 0, "width is 0"),
        ("width", 130, "130 channels"),
        ("multipliers", (1, 17), "136 channels"),
        ("multipliers", (1, 2, 2, 2, 2), "multiples of 16"),
        ("num_heads", 3, "3 heads"),
        ("dtype", "float16", "'float16'; valid: float32, bfloat16"),
        ("multipliers", (), "multipliers"),
        ("multipliers", (1, 0), "multipliers"),
        ("multipliers", (1, 1.5), "multipliers"),
        ("num_heads", 0, "num_heads"),
        ("num_blocks", -1, "num_blocks"),
        ("num_classes", -1, "num_classes"),
        ("dropout", 1.5, "dropout"),
    ],
    ids=str,
)
def test_a_field_that_gives_no_network_is_refused_by_its_name(field, value, message):
    with refused(message):
        shapes(UNet(**{**SMALL, field: value}))


@pytest.mark.parametrize("image", [(9, 8, 1), (8, 10, 1)], ids=str)
def test_images_that_cannot_be_halved_are_refused(image):
    with refused(f"{image[0]}x{image[1]}"):
        shapes(UNet(**{**SMALL, "multipliers": (1, 2, 2)}), image)


def test_labels_for_an_unconditional_model_are_refused():
    with refused("num_classes"):
        shapes(UNet(**SMALL), cond=jnp.zeros(1, int))


def test_equal_models_give_the_same_function():
    assert as_apply_fn(UNet(**SMALL)) is as_apply_fn(UNet(**SMALL))
    assert as_apply_fn(UNet(**SMALL)) is not as_apply_fn(UNet(**{**SMALL, "num_blocks": 2}))


def test_lists_from_a_config_file_give_the_function_of_tuples():
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    assert as_apply_fn(UNet(**lists)) is as_apply_fn(UNet(**SMALL))


def attended(model, image):
    return {name.removesuffix("_attention") for name in shapes(model, image) if name.endswith("_attention")}


def test_attention_stands_at_the_stated_resolutions_and_in_the_middle_alone():
    base = {"width": 8, "multipliers": (1, 1, 2), "num_blocks": 2}

    def level(i):
        return {f"down_{i}_block_{k}" for k in range(2)} | {f"up_{i}_block_{k}" for k in range(3)}

    for resolutions, levels in (((), ()), ((16,), (0,)), ((8,), (1,)), ((4, 16), (0, 2)), ((5,), ())):
        wanted = {"middle"}.union(*(level(i) for i in levels))
        assert attended(UNet(**base, attention_resolutions=resolutions), (16, 16, 1)) == wanted
