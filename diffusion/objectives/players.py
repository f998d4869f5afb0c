"""The players that train an autoencoder together, and the optimizer that moves them all.

Up to four share one tree of parameters, and so one state that a checkpoint holds:

- "autoencoder" learns to give back its images, by its own optimizer;
- "critic" learns to tell images from reconstructions, by another;
- "codebook" follows what the encoder says: a code is the running mean of the vectors that were nearest to it;
- "balance" follows two gradients, whose norms give the weight of the critic.

The last two learn by no gradient. What they follow are means over the whole batch, as gradients are, so it travels in
the gradient's place: then it is the same on any number of devices and microbatches.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffusion.types import Params

CODE_DECAY = 0.99
"""How much of the running mean of its vectors a code keeps in a step (van den Oord et al., arXiv:1711.00937, A.1)."""

DEAD = 0.03
"""A code that gets less than this part of its equal share of the vectors is dead, and takes one of the batch."""

MAX_BALANCE = 1e4
"""The critic's gradient counts at most so many times, as in latent diffusion."""

_LAST = ("decoder", "conv_out", "kernel")


def last(autoencoder: Params) -> Array:
    """Returns the parameter at whose gradients the critic is weighed: the kernel right before the image."""
    return autoencoder[_LAST[0]][_LAST[1]][_LAST[2]]


def with_last(autoencoder: Params, leaf: Array) -> Params:
    """Returns an autoencoder's parameters with another `last` one."""
    part, layer, name = _LAST
    return {**autoencoder, part: {**autoencoder[part], layer: {**autoencoder[part][layer], name: leaf}}}


def follow(player: Params, seen: Params) -> Float[Array, ""]:
    """Returns 0, with `seen` as its gradient to a player that follows it."""
    products = jax.tree.map(lambda p, s: jnp.sum(p * jax.lax.stop_gradient(s)), player, seen)
    through = sum(jax.tree.leaves(products))
    return through - jax.lax.stop_gradient(through)


def first_codebook(embedding: Float[Array, "K D"]) -> dict[str, Array]:
    """Returns the codebook before the first step: all codes are dead, so that the first batch fills it."""
    return {"embedding": embedding, "share": jnp.zeros(len(embedding)), "total": jnp.zeros_like(embedding)}


def first_balance(autoencoder: Params) -> dict[str, Array]:
    """Returns the balance before the first step, in which the critic counts nothing."""
    zero = jnp.zeros_like(last(autoencoder))
    return {"reconstruction": zero, "adversarial": jnp.copy(zero), "weight": jnp.zeros(())}


def follow_codes(codebook: dict[str, Array], seen: dict[str, Array]) -> dict[str, Array]:
    """Returns the codebook after a step: running means, and new vectors for dead codes.

    Args:
      codebook: "embedding" [K, D], the codes; "share" [K], the running mean of the share of vectors that were nearest
        to each; "total" [K, D], that of their sum over the number of all vectors.
      seen: the same of a batch, where "embedding" holds the vectors that dead codes take.
    """
    share = CODE_DECAY * codebook["share"] + (1 - CODE_DECAY) * seen["share"]
    total = CODE_DECAY * codebook["total"] + (1 - CODE_DECAY) * seen["total"]
    equal = 1 / len(share)
    dead = share < DEAD * equal
    share = jnp.where(dead, equal, share)
    total = jnp.where(dead[:, None], equal * seen["embedding"], total)
    return {"embedding": total / share[:, None], "share": share, "total": total}


def follow_balance(seen: dict[str, Array]) -> dict[str, Array]:
    """Returns the balance after a step: the critic's weight makes both gradients of the last layer equally long."""
    ours, critics = (jnp.linalg.norm(seen[name].ravel()) for name in ("reconstruction", "adversarial"))
    weight = jnp.where(critics > 0, ours / jnp.maximum(critics, ours / MAX_BALANCE), 0.0)
    return {**seen, "weight": weight}


def players_optimizer(
    autoencoder: optax.GradientTransformation, critic: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns the optimizer of the tree of all players.

    Args:
      autoencoder: moves the autoencoder.
      critic: moves its critic, from the step on in which that first has a gradient.
    """
    movers = {"autoencoder": autoencoder, "critic": critic}

    def init(params):
        return {name: mover.init(params[name]) for name, mover in movers.items() if name in params}

    def update(seen, state, params):
        updates, after = {}, {}
        for name in state:
            updates[name], after[name] = movers[name].update(seen[name], state[name], params[name])
        if "critic" in state:  # so its warm-up and its moments begin with it
            begun = optax.tree.norm(seen["critic"]) > 0
            fresh = (after["critic"], updates["critic"])
            still = (state["critic"], jax.tree.map(jnp.zeros_like, updates["critic"]))
            after["critic"], updates["critic"] = jax.tree.map(lambda a, b: jnp.where(begun, a, b), fresh, still)
        followed = {}
        if "codebook" in params:
            followed["codebook"] = follow_codes(params["codebook"], seen["codebook"])
        if "balance" in params:
            followed["balance"] = follow_balance(seen["balance"])
        return {**updates, **{n: jax.tree.map(jnp.subtract, new, params[n]) for n, new in followed.items()}}, after

    return optax.GradientTransformation(init, update)


def saved_part(params: Params) -> Params:
    """Returns what is kept of all players: the autoencoder's parameters, with its codes."""
    if "codebook" not in params:
        return params["autoencoder"]
    return {**params["autoencoder"], "quantizer": {"embedding": params["codebook"]["embedding"]}}


def learning_part(params: Params) -> Params:
    """Returns the part whose gradient is logged."""
    return params["autoencoder"]
