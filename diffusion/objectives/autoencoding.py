"""The objectives of autoencoders, pure functions of a batch whose parameters are those of all players."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion import keys
from diffusion.objectives.losses import Batch, Terms
from diffusion.objectives.players import DEAD, follow, last, with_last
from diffusion.types import Images, Params


class Parts(NamedTuple):
    """The functions that an autoencoder's objective is made of.

    Attributes:
      encode: (params, images) -> mean and log-variance of latents.
      decode: (params, latents) -> images; the latents are codes already where there is a codebook.
      nearest: (latents, codes [K, D]) -> the number of the code nearest to each; None without a codebook.
      judge: (params, images) -> how real the patches of each are, [B, h, w]; None without a critic.
      features: (frozen, images) -> activations of a network that was trained before, each [B, ..., C]; None without
        perceptual loss.
    """

    encode: Callable[[Params, Images], tuple[Array, Array]]
    decode: Callable[[Params, Array], Images]
    nearest: Callable[[Array, Array], Array] | None = None
    judge: Callable[[Params, Images], Array] | None = None
    features: Callable[[Any, Images], tuple[Array, ...]] | None = None


def kl_terms(
    batch: Batch,
    parts: Parts,
    l1: float = 1.0,
    l2: float = 0.0,
    kl: float = 1e-6,
    perceptual: float = 0.0,
    adversarial: float = 0.0,
    adversarial_start: int = 0,
) -> Terms:
    """Returns what an autoencoder with Gaussian latents makes small (latent diffusion, arXiv:2112.10752, appendix G).

    Args:
      batch: its params are the tree of all players, see `objectives.players`.
      parts: see `Parts`.
      l1, l2: weights of the mean absolute and of the mean squared error of pixels in [-1, 1].
      kl: weight of the divergence of the latents from N(0, 1), in nats per number of the image.
      perceptual: weight of the distance in the features of a network.
      adversarial: weight of the critic, which is balanced to have as large a gradient as the reconstruction.
      adversarial_start: training steps before the critic begins.
    """
    mean, log_variance = parts.encode(batch.params["autoencoder"], batch.x_0)
    noise = jax.vmap(lambda k: keys.normal(jax.random.fold_in(k, 1), mean.shape[1:], mean.dtype))(batch.keys)
    divergence = kl_divergence(mean, log_variance) / batch.x_0[0].size
    given_back = _given_back(batch, parts, mean + jnp.exp(0.5 * log_variance) * noise, (l1, l2, perceptual))
    found = _judged(batch, parts, given_back, adversarial, adversarial_start)
    return Terms(found.value + kl * divergence, {"kl": divergence, **found.curves})


def vq_terms(
    batch: Batch,
    parts: Parts,
    l1: float = 1.0,
    l2: float = 0.0,
    commitment: float = 0.25,
    perceptual: float = 0.0,
    adversarial: float = 0.0,
    adversarial_start: int = 0,
) -> Terms:
    """Returns what an autoencoder with a codebook makes small (VQ-VAE, arXiv:1711.00937, Eq. 3 and appendix A.1).

    Arguments are as for `kl_terms`, except for the weight of the squared distance between latents and their codes,
    `commitment`.
    """
    codebook = batch.params["codebook"]
    z = parts.encode(batch.params["autoencoder"], batch.x_0)[0]
    chosen, statistics = _looked_up(z, codebook, batch, parts.nearest)
    distance = _mean(jnp.square(z - chosen))
    given_back = _given_back(batch, parts, z + jax.lax.stop_gradient(chosen - z), (l1, l2, perceptual))
    found = _judged(batch, parts, given_back, adversarial, adversarial_start)
    value = found.value + commitment * distance + follow(codebook, statistics)
    used = (codebook["share"] > DEAD / len(codebook["share"])).mean()
    return Terms(value, {"commitment": distance, "codes_in_use": used, **found.curves})


def kl_divergence(mean: Float[Array, "B *s"], log_variance: Float[Array, "B *s"]) -> Float[Array, "B"]:
    """Returns KL(N(mean, variance) || N(0, 1)) in nats, summed over the numbers of each sample."""
    each = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return each.reshape(len(each), -1).sum(axis=1)


def perceptual_distance(ours: tuple[Array, ...], theirs: tuple[Array, ...]) -> Float[Array, "B"]:
    """Returns the mean over layers of the squared distance between activations whose channels have norm 1.

    It is LPIPS (arXiv:1801.03924, Eq. 1) with equal weights.
    """

    def unit(x):
        return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-10)

    layers = [_mean(jnp.square(unit(a) - unit(b)).sum(axis=-1)) for a, b in zip(ours, theirs, strict=True)]
    return sum(layers) / len(layers)


class _GivenBack(NamedTuple):
    """Images after encoding and decoding.

    Attributes:
      images: the reconstructions.
      to_last: gradient of the images -> gradient of the last parameter, summed over the samples.
      value: the loss of each.
      cotangent: its gradient to the image.
      curves: what it consists of.
    """

    images: Images
    to_last: Callable[[Images], tuple[Array, ...]]
    value: Float[Array, "B"]
    cotangent: Images
    curves: dict[str, Float[Array, "B"]]


def _given_back(batch, parts, z, weights):
    """Decodes latents, and compares the images with what was encoded."""
    x, autoencoder = batch.x_0, batch.params["autoencoder"]
    l1, l2, perceptual = weights

    def loss(images):
        absolute, square = _mean(jnp.abs(images - x)), _mean(jnp.square(images - x))
        value, curves = l1 * absolute + l2 * square, {"l1": absolute, "l2": square}
        if parts.features is not None:
            curves["perceptual"] = perceptual_distance(*(parts.features(batch.frozen, y) for y in (images, x)))
            value = value + perceptual * curves["perceptual"]
        return value, curves

    # The gradient of the last parameter by itself is cheap, once that of the image is known.
    images, to_last = jax.vjp(lambda leaf: parts.decode(with_last(autoencoder, leaf), z), last(autoencoder))
    value, pull, curves = jax.vjp(loss, images, has_aux=True)
    return _GivenBack(images, to_last, value, pull(jnp.ones_like(value))[0], curves)


def _judged(batch, parts, given_back, weight, start):
    """Returns the loss of reconstructions with what the critic says of them, and the critic's own."""
    images, to_last, value, cotangent, curves = given_back
    if parts.judge is None:
        return Terms(_with_gradient(value, _inner(cotangent, images)), curves)
    duel = _duel(parts.judge, batch.params["critic"], batch.x_0, images, batch.step >= start)
    # Both gradients of the last parameter travel to the balance, whose weight this step has from the one before.
    balance = batch.params["balance"]
    seen = {"reconstruction": to_last(cotangent)[0], "adversarial": to_last(duel.cotangent)[0]}
    seen = {**jax.tree.map(lambda g: g / len(images), seen), "weight": jnp.zeros(())}
    weight = weight * jax.lax.stop_gradient(balance["weight"])
    value = value + weight * duel.autoencoder
    value = _with_gradient(value, _inner(cotangent + weight * duel.cotangent, images))
    curves = {**curves, "adversarial": duel.autoencoder, "critic": duel.critic, "critic_weight": weight}
    return Terms(value + duel.critic + follow(balance, seen), curves)


def _looked_up(z, codebook, batch, nearest):
    """Returns the codes nearest to z [B, h, w, D], and what the batch says of the codebook."""
    embedding, z = jax.lax.stop_gradient((codebook["embedding"], z))
    index = nearest(z, embedding)
    hot = jax.nn.one_hot(index, len(embedding), dtype=z.dtype)
    statistics = {
        "share": hot.sum(axis=(0, 1, 2)) / index.size,
        "total": jnp.einsum("bhwk,bhwd->kd", hot, z) / index.size,
        "embedding": _candidates(z, len(embedding), batch),
    }
    return embedding[index], statistics


def _candidates(z, codes, batch):
    """Returns for each code a vector out of the whole batch, drawn at random, of which each part gives its share."""
    flat = z.reshape(len(z), -1, z.shape[-1])
    key = jax.random.fold_in(keys.make(0), batch.step)
    with jax.threefry_partitionable(True):
        drawn = jax.random.choice(key, batch.size * flat.shape[1], (codes,), replace=codes > batch.size * flat.shape[1])
    sample, place = drawn // flat.shape[1], drawn % flat.shape[1]
    ours = jnp.asarray(batch.index[:, None] == sample[None, :], z.dtype)
    return jnp.einsum("bk,bkd->kd", ours, flat[:, place]) * batch.size / len(z)


class _Duel(NamedTuple):
    """What a critic says, one number a sample, and the gradient of the first to the reconstruction."""

    autoencoder: Float[Array, "B"]
    cotangent: Images
    critic: Float[Array, "B"]


def _duel(judge, critic, real, images, begun):
    """Returns the hinge losses of the autoencoder and of its critic; 0, at no cost, before the critic has begun."""
    fixed = jax.lax.stop_gradient(images)

    def fight(critic):
        loss, pull = jax.vjp(lambda images: -_mean(judge(jax.lax.stop_gradient(critic), images)), fixed)
        hinge = _mean(jax.nn.relu(1 - judge(critic, real))) + _mean(jax.nn.relu(1 + judge(critic, fixed)))
        return _Duel(loss, pull(jnp.ones_like(loss))[0], 0.5 * hinge)

    def wait(critic):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fight, critic))

    return jax.lax.cond(begun, fight, wait, critic)


def curve_names(parts: Parts) -> tuple[str, ...]:
    """Returns the names of the curves that an autoencoder's objective gives, in their order."""
    names = ["commitment", "codes_in_use"] if parts.nearest is not None else ["kl"]
    names += ["l1", "l2"] + ["perceptual"] * (parts.features is not None)
    return (*names, *(["adversarial", "critic", "critic_weight"] if parts.judge is not None else []))


def _with_gradient(value, through):
    """Returns value, with the gradient of `through`."""
    return jax.lax.stop_gradient(value) + (through - jax.lax.stop_gradient(through))


def _inner(cotangent, images):
    """Returns for each sample the product of a fixed gradient with its image."""
    return (jax.lax.stop_gradient(cotangent) * images).reshape(len(images), -1).sum(axis=1)


def _mean(x: Float[Array, "B *s"]) -> Float[Array, "B"]:
    return x.reshape(len(x), -1).mean(axis=1)
