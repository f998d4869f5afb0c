"""Laws of the UNet and its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import refused

from diffusion.models import UNet, as_apply_fn
from diffusion.models.layers import (
    Dense,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    dropout,
    num_groups,
    sinusoidal_embedding,
)

pytestmark = pytest.mark.usefixtures("hardly_optimized")

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


@pytest.mark.parametrize("shape", [(3, 4, 4, 5), (2, 9, 5), (2, 2, 3, 5), (4, 5)], ids=str)
def test_a_dense_layer_has_the_values_and_derivatives_of_flax(shape):
    """With more positions than features, fewer, and none."""
    x, line = normal(shape), normal(shape, 1)
    params = nn.Dense(7).init(key(2), x)["params"]

    def moved(layer, params):  # the derivative along a line, as MeanFlow's loss has it
        return jax.jvp(lambda x: jnp.square(layer.apply({"params": params}, x)), (x,), (line,))[1]

    for of in (moved, lambda layer, params: layer.apply({"params": params}, x)):
        found, back = jax.vjp(lambda p, of=of: of(Dense(7), p), params)
        wanted, wanted_back = jax.vjp(lambda p, of=of: of(nn.Dense(7), p), params)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        ahead = jnp.cos(found)
        jax.tree.map(
            lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-5, atol=1e-4), back(ahead), wanted_back(ahead)
        )


def test_a_derivative_along_x_alone_multiplies_with_no_zeros():
    layer, x = Dense(5), normal((2, 9, 5))
    params = layer.init(key(), x)
    text = str(jax.make_jaxpr(lambda d: jax.jvp(lambda x: layer.apply(params, x), (x,), (d,)))(x))
    assert text.count("dot_general[") == 2


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


@pytest.mark.parametrize("num_heads", [1, 2])
def test_self_attention_is_jaxs_dot_product_attention(num_heads):
    layer, x = SelfAttention(num_heads, jnp.float32), normal((2, 3, 5, 8))
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(layer.init, key(), x)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), tree)
    p = params["params"]
    h = GroupNorm().apply({"params": p["norm"]}, x).reshape(2, 15, 8)

    def project(name, h):
        return jnp.einsum("...c,cd->...d", h, p[name]["kernel"]) + p[name]["bias"].reshape([1] * (h.ndim - 1) + [-1])

    heads = [project(name, h).reshape(2, 15, num_heads, 8 // num_heads) for name in ("query", "key", "value")]
    wanted = x + project("out", jax.nn.dot_product_attention(*heads).reshape(2, 3, 5, 8))
    np.testing.assert_allclose(layer.apply(params, x), wanted, atol=1e-4)


def test_any_number_of_channels_has_equal_groups_of_at_least_four():
    for channels in range(4, 1025):
        groups = num_groups(channels)
        assert channels % groups == 0
        assert groups <= 32
        assert channels // groups >= 4
    assert num_groups(128) == 32
    assert num_groups(144) == 24  # 32 does not divide it
    assert num_groups(2) == 1


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


def test_dropout_acts_where_keys_are_given_and_nowhere_else():
    plain, dropped = UNet(**TINY), UNet(**TINY, dropout=0.5)
    params, x, t = random_params(plain), normal((2, 4, 4, 1)), jnp.array([10.0, 500.0])
    train = jax.jit(lambda keys: as_apply_fn(dropped)(params, x, t, dropout_keys=keys))
    without = jax.jit(as_apply_fn(plain))(params, x, t)
    np.testing.assert_array_equal(jax.jit(as_apply_fn(dropped))(params, x, t), without)
    first, again, other = (train(jax.random.split(key(seed), 2)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3
    assert np.max(np.abs(first - without)) > 1e-3


def test_dropout_of_a_sample_follows_from_its_own_key_whatever_the_batch():
    model = UNet(**TINY, dropout=0.5)
    params, x, t = random_params(model), normal((4, 4, 4, 1)), jnp.array([10.0, 500.0, 10.0, 900.0])
    train = jax.jit(lambda x, t, keys: as_apply_fn(model)(params, x, t, dropout_keys=keys))
    keys, order = jax.random.split(key(1), 4), np.array([2, 0, 3, 1])
    whole = train(x, t, keys)
    np.testing.assert_allclose(train(x[order], t[order], keys[order]), whole[order], atol=1e-5)
    halves = [train(x[part], t[part], keys[part]) for part in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-5)
    same = train(jnp.stack([x[0]] * 4), jnp.stack([t[0]] * 4), keys)
    assert np.max(np.abs(same[0] - same[1])) > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_rate_of_elements_and_keeps_the_mean(rate):
    out = np.asarray(dropout(jax.random.split(key(), 8), 3, rate, jnp.ones((8, 16, 16, 8))))
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
    np.testing.assert_allclose(np.mean(out == 0), rate, atol=5 * np.sqrt(rate * (1 - rate) / out.size))
    assert np.all((out == 0).mean(axis=(1, 2, 3)) < 1)


def test_two_layers_draw_different_masks():
    keys, ones = jax.random.split(key(), 2), jnp.ones((2, 8, 8, 4))
    assert np.mean(dropout(keys, 0, 0.5, ones) != dropout(keys, 1, 0.5, ones)) > 0.4


def test_no_random_bits_are_drawn_without_dropout():
    params, x, t = shapes(UNet(**TINY)), normal((2, 4, 4, 1)), jnp.ones(2)
    keys = jax.random.split(key(), 2)

    def program(rate):
        apply_fn = as_apply_fn(UNet(**TINY, dropout=rate))
        return str(jax.make_jaxpr(lambda p: apply_fn(p, x, t, dropout_keys=keys))(params))

    assert "random_bits" in program(0.5)
    assert "random" not in program(0.0)


def test_a_jacobian_vector_product_and_float64_go_through_the_network():
    """Likelihoods by Hutchinson's estimator need both."""
    with jax.enable_x64(True):
        model = UNet(**TINY)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), random_params(model))
        x, direction = jnp.asarray(normal((2, 4, 4, 1))), jnp.asarray(normal((2, 4, 4, 1), seed=1))
        apply_fn = jax.jit(lambda x: as_apply_fn(model)(params, x, jnp.array([10.0, 500.0])))
        _, tangent = jax.jvp(apply_fn, (x,), (direction,))
        _, pullback = jax.vjp(apply_fn, x)
        np.testing.assert_allclose(jnp.vdot(pullback(tangent)[0], direction), jnp.vdot(tangent, tangent), rtol=1e-4)
        each = jax.vmap(lambda image: apply_fn(jnp.stack([image] * 2))[0])(x)
        np.testing.assert_allclose(each[0], apply_fn(x)[0], atol=1e-4)


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


@pytest.mark.parametrize(("width", "multipliers"), [(130, (1, 2)), (8, (1, 17)), (24, (1, 2, 4))], ids=str)
def test_levels_that_32_groups_do_not_divide_make_a_network(width, multipliers):
    shapes(UNet(**{**SMALL, "width": width, "multipliers": multipliers}))


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
