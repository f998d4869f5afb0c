"""Turns the tensors of a torch network into parameters of ours and back: other names, and axes in another order."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.interop.diffusers.folders import Weights
from diffusion.types import Params

Name = Callable[[tuple[str, ...]], str]
"""The path of one of our parameters -> the name of the tensor that it is there."""


class Written(NamedTuple):
    """A network as diffusers has it.

    Attributes:
      config: with its _class_name.
      tensors: by name.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""What the last part of a path is called there."""

_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What the layers of attention are called in files of 2022, and since."""

SHOWN = 3
"""How many names an error lists."""


def current_name(name: str) -> str:
    """Returns today's name of a tensor."""
    for old, new in _OLD.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def to_params(
    weights: Weights,
    like: Params,
    name_of: Name,
    ignored: Callable[[str], bool] | None = None,
    dtype: str = "float32",
) -> Params:
    """Returns parameters with the values of tensors, each read only once it is known to fit.

    Args:
      weights: the tensors.
      like: a tree with the shapes of the parameters.
      name_of: which tensor each of them is.
      ignored: which tensors hold nothing that is learned.
      dtype: of matrices and kernels, "float32" or "bfloat16", which halves the memory; vectors are float32.

    Raises:
      InputError: tensors are missing, unknown, of another shape or not finite; they are named.
    """
    theirs = {current_name(name): name for name in weights.shapes if ignored is None or not ignored(name)}
    wanted = {name_of(path): (path, leaf) for path, leaf in flax.traverse_util.flatten_dict(like).items()}
    for problem, names in (
        ("lacks", wanted.keys() - theirs),
        ("has, and this network does not,", theirs.keys() - wanted),
    ):
        if names:
            raise InputError(
                f"{weights.where} {problem} {_some(names)}: it holds another network than its config describes; get "
                "the whole folder again"
            )
    for name, (path, leaf) in wanted.items():
        found = tuple(weights.shapes[theirs[name]])
        if found not in _shapes(path, leaf.shape):
            raise InputError(
                f"{weights.where}: {name} has shape {found}, and its config wants {_shapes(path, leaf.shape)[0]}"
            )
    params = {}
    for name, (path, leaf) in wanted.items():
        array = weights.read(theirs[name])
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != jnp.bfloat16:
            raise InputError(f"{weights.where}: {name} has numbers of type {array.dtype}, not real ones; get it again")
        array = array.astype(np.float32).reshape(_shapes(path, leaf.shape)[0])
        if not np.isfinite(array).all():
            raise InputError(f"{weights.where}: {name} is not finite; get the file again")
        array = array.transpose(_axes(path, array.ndim))
        params[path] = jnp.asarray(array, dtype if array.ndim > 1 else np.float32)
    return flax.traverse_util.unflatten_dict(params)


def to_tensors(params: Params, name_of: Name, pixelwise: Callable[[str], bool] | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors that parameters are there, the inverse of `to_params`.

    Args:
      params: nested dicts.
      name_of: as for `to_params`.
      pixelwise: which names are convolutions of one pixel there and dense layers here.
    """
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        name, array = name_of(path), np.asarray(leaf)
        array = array.transpose(np.argsort(_axes(path, array.ndim)))
        if pixelwise is not None and path[-1] == "kernel" and pixelwise(name):
            array = array[:, :, None, None]
        tensors[name] = np.ascontiguousarray(array)
    return tensors


def _axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns which of their axes is each of ours: kernels have the outputs first there and last here."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return {4: (2, 3, 1, 0), 2: (1, 0)}[ndim]


def _shapes(path, shape) -> list[tuple[int, ...]]:
    """Returns the shapes that a tensor can have: a dense layer may be a convolution of one pixel there."""
    axes = _axes(path, len(shape))
    theirs = tuple(shape[i] for i in np.argsort(axes))
    return [theirs, (*theirs, 1, 1)] if path[-1] == "kernel" and len(shape) == 2 else [theirs]


def _some(names: Any) -> str:
    """Lists a few names, and says how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])[:300]}{more}"


def fields_of(where: str, config: Mapping[str, Any], defaults: Mapping[str, Any], foreign: Any = ()) -> dict[str, Any]:
    """Returns the arguments of a class as a config has them, with the class's defaults for those that it lacks.

    Args:
      where: what errors call the config.
      config: theirs; names that begin with "_" are no arguments.
      defaults: the arguments of the class.
      foreign: arguments of other classes, which the class itself does not read.

    Raises:
      InputError: an argument that nobody knows.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(given.keys() - defaults - set(foreign)):
        raise InputError(f"{where} has a field {unknown[0]!r}, which this version does not know; take a known model")
    return {**defaults, **{name: value for name, value in given.items() if name in defaults}}


def require(where: str, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InputError unless each of these fields has one of the values that are supported."""
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            shown = ", ".join("null" if value is None else str(value) for value in values)
            raise InputError(f"{where}: {name} is {fields[name]!r}, which is not supported; supported: {shown}")
