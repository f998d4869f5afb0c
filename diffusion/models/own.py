"""Makes a network of anybody's own, in Flax, Equinox or plain JAX, fit for training, sampling and files."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from diffusion import keys
from diffusion.caching import Split
from diffusion.errors import InputError, users_code
from diffusion.types import ApplyFn, Params


class Network(NamedTuple):
    """A network in the form that the rest of the library takes.

    Attributes:
      init: key -> params, nested dicts of float32 arrays.
      apply_fn: the network; it also takes dropout_keys, as that of `as_apply_fn` does.
      split: the network for `diffusion.caching`, or None.
    """

    init: Callable[[jax.Array], Params]
    apply_fn: ApplyFn
    split: Split | None = None


def adapt(
    init: Callable[[jax.Array], Any],
    apply: Callable[..., jax.Array],
    image_shape: tuple[int, int, int],
    *,
    out_channels: int = 0,
    num_classes: int = 0,
    sees_end: bool = False,
    sees_scale: bool = False,
    what: str = "the network",
) -> Network:
    """Returns a network of one's own as the library takes it, after checking its shapes without computing anything.

    Args:
      init: key -> params, any pytree of floating arrays, such as dicts, an nnx.State, or the arrays of an Equinox
        module. It works inside jit. They are kept in float32.
      apply: (params, x, t, cond) -> prediction. x is float [B, H, W, C]; t float32 [B], as a rule timesteps in 1..T;
        cond int32 [B], labels in 0..num_classes where num_classes itself means "no class", or None if num_classes is
        0. The prediction is a float [B, H, W, out_channels]. With a parameter dropout_keys it gets typed keys [B] in
        training, one for each sample, and None elsewhere.
      image_shape: (H, W, C) of x.
      out_channels: of the prediction; 0 for as many as x has.
      num_classes: 0 for an unconditional network.
      sees_end: whether t is [B, 2], times in 1..T and the times in 0..T that the steps go to, as for prediction
        mean_flow.
      sees_scale: whether cond is (labels, scales), with guidance scales float32 [B], as for objective
        guidance_distillation.
      what: what to call it in errors.

    Raises:
      InputError: init or apply fails, parameters cannot be trained or named, or the prediction has another shape.
    """
    like = _call(what, "init", init, keys.make(0))
    to_dicts, from_dicts = _namer(what, like)
    takes_keys = _takes_dropout_keys(what, apply)

    def apply_fn(params, x, t, cond=None, *, dropout_keys=None):
        if num_classes and cond is None:
            cond = jnp.full(x.shape[:1], num_classes, jnp.int32)
            cond = (cond, jnp.ones(x.shape[:1])) if sees_scale else cond
        dropout = {"dropout_keys": dropout_keys} if takes_keys else {}
        return apply(from_dicts(params), x, t.astype(jnp.float32), cond, **dropout).astype(x.dtype)

    # Two samples, for a network of a fixed batch size to be found.
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), like)
    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    t, labels = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    told = (labels, t) if sees_scale else labels
    t = jax.ShapeDtypeStruct((2, 2), jnp.float32) if sees_end else t
    arguments = (like, x, t, told if num_classes else None)
    dropout = {"dropout_keys": jax.eval_shape(lambda: jax.random.split(keys.make(0), 2))} if takes_keys else {}
    out = _call(what, "apply", apply, *arguments, **dropout)
    wanted = (2, *image_shape[:-1], out_channels or image_shape[-1])
    if getattr(out, "shape", None) != wanted or not jnp.issubdtype(out.dtype, jnp.floating):
        found = f"{out.dtype} {out.shape}" if hasattr(out, "shape") else f"a {type(out).__name__}"
        raise InputError(
            f"{what}: apply returns {found} for two images {tuple(image_shape)}; it must be float {wanted}"
        )
    return Network(lambda key: to_dicts(init(key)), apply_fn)


def _call(what, part, function, *args, **kwargs):
    """Returns the shapes of a call; an error in it becomes one line."""
    with users_code(f"{what}: {part}"):
        return jax.eval_shape(function, *args, **kwargs)


def _takes_dropout_keys(what, apply):
    """Tells whether apply takes dropout_keys; refuses one that does not take (params, x, t, cond)."""
    try:
        parameters = inspect.signature(apply).parameters
        inspect.signature(apply).bind(*range(4), **{"dropout_keys": 0} if "dropout_keys" in parameters else {})
    except TypeError:
        raise InputError(
            f"{what}: apply takes {inspect.signature(apply) if callable(apply) else 'nothing, it is no function'}; it "
            "must take (params, x, t, cond), and may take dropout_keys"
        ) from None
    return "dropout_keys" in parameters


def _namer(what, like):
    """Returns two functions, from params as the network has them to nested dicts, in which they are kept, and back.

    Checkpoints and files know each array by its path. Dicts of dicts stay as they are.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    wrong = [(path, x.dtype) for path, x in leaves if not jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves or wrong:
        found = "no arrays" if not leaves else f"{wrong[0][1]} at {jax.tree_util.keystr(wrong[0][0])}"
        raise InputError(
            f"{what}: init returns {found}; it must return floating arrays, all of which are trained, such as "
            "module.init(...)['params'] or nnx.split(model, nnx.Param, ...)[1]"
        )
    names = [tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")) for path, _ in leaves]
    inner = {name[:depth] for name in names for depth in range(len(name))}
    if len(set(names)) < len(names) or inner & set(names):
        raise InputError(f"{what}: two arrays of init have one name; name them apart")

    def to_dicts(params):
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
        return flax.traverse_util.unflatten_dict(dict(zip(names, leaves, strict=True)))

    def from_dicts(params):
        flat = flax.traverse_util.flatten_dict(params)
        return jax.tree.unflatten(tree, [flat[name] for name in names])

    return to_dicts, from_dicts
