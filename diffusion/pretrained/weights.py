"""Keeps a trained model in one safetensors file: the parameters of an EMA, its config, and what was measured."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from diffusion import keys
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.errors import InputError, is_whole
from diffusion.files import remove_temporaries, write_atomically
from diffusion.interop.safetensors_file import Header, read_header, read_tensors
from diffusion.model import UNET2D_CONDITION, Trained, check_finite
from diffusion.records import autoencoder_from_record, config_from_record, from_record, readable
from diffusion.sealed import digest, digest_of
from diffusion.types import Params

SUFFIX = ".safetensors"
_FORMATS, _ENTRY = ("jax-fast-diffusion 1", "jax-fast-diffusion 2"), "model"
"""The first had a digest of the weights and none of the text."""

_NETWORK, _AUTOENCODER = "network", "autoencoder"
"""The two trees of parameters in the file of a latent model; that of any other has only one, without a name."""

HALVES = ("float16", "bfloat16")
"""The types in which matrices may be kept to halve the size of a file; vectors stay in float32."""

_FACTS = {"config": dict, "image_shape": list, "class_names": list, "step": int, "ema": str, "sha256": str}


def save(
    path: str | os.PathLike, trained: Trained, figures: dict[str, Any] | None = None, dtype: str = "float32"
) -> None:
    """Writes the parameters, config and figures to a file, whole or not at all.

    Args:
      path: ends in .safetensors; an existing file is replaced.
      trained: from `run_folder.load_trained`.
      figures: what was measured, as anything JSON can hold; `describe` returns it to whoever asks.
      dtype: "float32", or one of `HALVES`; the model in the file is then the rounded one, again in float32.

    Raises:
      InputError: a parameter is not finite, or not in dtype; or it is a text-to-image model, of which the text encoder
        would be lost.
    """
    if trained.config.network == UNET2D_CONDITION:
        raise InputError(
            "this is a text-to-image model, and no file holds its text encoder and tokenizer; sample.py and learn.py "
            "take its folder"
        )
    facts = {
        "config": trained.config.to_dict(),
        "image_shape": list(trained.model.space.image_shape),
        "class_names": [] if trained.model.conditions is None else list(trained.model.conditions.names),
        "step": trained.step,
        "ema": trained.ema,
        "figures": figures or {},
    }
    params, autoencoder = trained.params, trained.model.space.autoencoder
    if autoencoder is not None:
        params = {_NETWORK: params, _AUTOENCODER: autoencoder.params}
        kept = _restored(_kept(autoencoder.params, dtype))
        facts[_AUTOENCODER] = autoencoder._replace(sha256=digest(kept)).facts()
    write(path, params, facts, dtype)


def write(path: str | os.PathLike, params: Params, facts: Mapping[str, Any], dtype: str = "float32") -> None:
    """Writes parameters and facts to a file, sealed, whole or not at all; raises as `save`.

    Args:
      path: ends in .safetensors; an existing file is replaced.
      params: nested dicts of arrays.
      facts: config, image_shape, class_names, step, ema and figures.
      dtype: as for `save`.
    """
    check_finite(params, "the model")
    facts = _travelling(facts)
    arrays = flax.traverse_util.flatten_dict(_kept(params, dtype), sep="/")
    # The digest is of the parameters as they are read, whatever the type in which they are kept.
    facts = {"format": _FORMATS[-1], **facts, "sha256": digest(_restored(arrays))}
    facts["digest"] = digest_of(facts)  # of the text, which has that of the weights in it
    # One entry holds all facts: safetensors writes several in any order, and the same model should give the same file.
    path = Path(path)
    remove_temporaries(path.parent, re.escape(path.name))
    write_atomically(path, safetensors.numpy.save(arrays, {_ENTRY: json.dumps(facts, sort_keys=True)}))


_PATHS = (("data", "path"), ("teacher",), ("latents",))
"""The fields of a config that may be paths."""


def _travelling(facts):
    """Returns facts for a file that others get: of a path from the root of this machine only its last part is kept."""
    config = dict(facts["config"])
    for *sections, name in _PATHS:
        section = config
        for part in sections:
            section[part] = section = dict(section[part])
        value = section.get(name) or ""
        if value.startswith("~") or Path(value).is_absolute():
            section[name] = Path(value).name
    autoencoder = {_AUTOENCODER: _travelling(facts[_AUTOENCODER])} if _AUTOENCODER in facts else {}
    return {**facts, "config": config, **autoencoder}


def _kept(params, dtype):
    """Returns parameters as a file keeps them."""
    if dtype != "float32" and dtype not in HALVES:
        raise InputError(f"dtype is {dtype!r}; valid: float32, {', '.join(HALVES)}")

    def half(leaf):
        leaf = np.asarray(leaf)
        if dtype == "float32" or leaf.ndim < 2 or leaf.dtype != np.float32:
            return leaf
        with np.errstate(over="ignore"):
            small = leaf.astype(dtype)
        if not np.isfinite(small).all():
            raise InputError(f"a weight is {np.abs(leaf).max():.3g}, which {dtype} does not hold; write float32")
        return small

    return jax.tree.map(half, params)


def _restored(arrays):
    """Returns parameters that a file keeps as the model has them; no network has parameters of half precision."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype.name in HALVES else leaf, arrays)


def load(path: str | os.PathLike, networks: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> Trained:
    """Reads what `save` wrote.

    Args:
      path: the file.
      networks: see `make_model`.

    Raises:
      InputError: there is no such file, it is damaged, or `save` did not write it.
    """
    header, facts = read_facts(path)
    if not config_from_record(facts, str(path)).latents:
        config, model = from_record(facts, str(path), networks)
        params = read_params(path, header, facts, jax.eval_shape(model.init, keys.make(0)))
        return Trained(model, params, config, facts["step"], facts["ema"])
    # The autoencoder comes first, as the shape of its latents is that of the network's samples.
    with readable(str(path)):
        theirs = dict(facts[_AUTOENCODER])
        step, ema, sha256 = theirs["step"], theirs["ema"], theirs["sha256"]
    autoencoder_config, autoencoder = autoencoder_from_record(theirs, str(path))
    empty = TrainedAutoencoder(autoencoder, {}, autoencoder_config, step, ema, sha256)
    like = {_NETWORK: from_record(facts, str(path), networks, empty)[1].init, _AUTOENCODER: autoencoder.init}
    like = {name: jax.eval_shape(init, keys.make(0)) for name, init in like.items()}
    params = read_params(path, header, facts, like)
    found = empty._replace(params=params[_AUTOENCODER])
    if digest(found.params) != sha256:
        raise InputError(f"{path} is damaged: its autoencoder is not the one that it names; get it again")
    config, model = from_record(facts, str(path), networks, found)
    return Trained(model, params[_NETWORK], config, facts["step"], facts["ema"])


def read_params(path: str | os.PathLike, header: Header, facts: Mapping[str, Any], like: Params) -> Params:
    """Returns the parameters in a file, once they are known to be those of its config, whole and finite.

    Args:
      path: the file.
      header, facts: from `read_facts`.
      like: a tree with the shapes and dtypes that its config gives.

    Raises:
      InputError: they are not.
    """
    wanted = flax.traverse_util.flatten_dict(like, sep="/")
    halves = {np.dtype(name): np.dtype(np.float32) for name in HALVES}
    shapes = {name: (tensor.shape, halves.get(tensor.dtype, tensor.dtype)) for name, tensor in header.tensors.items()}
    if shapes != {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}:
        raise InputError(f"{path} holds weights of another network than its config describes; convert it again")
    arrays = _restored(read_tensors(Path(path).expanduser(), header.tensors))
    if digest(arrays) != facts["sha256"]:
        raise InputError(f"{path} is damaged: its weights are not those that were written; get it again")
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    check_finite(params, str(path))
    return jax.tree.map(jax.numpy.asarray, params)


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Returns everything but the parameters: config, image_shape, class_names, step, ema, figures, sha256."""
    return read_facts(path)[1]


def read_facts(path: str | os.PathLike) -> tuple[Header, dict[str, Any]]:
    """Returns the header and the facts of a file; raises as `load` where the file is at fault."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no file {path}; name a run folder or a file that convert.py wrote")
    try:
        header = read_header(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    try:
        facts = json.loads(header.metadata.get(_ENTRY, "{}"))
        if facts.get("format") not in _FORMATS:
            raise InputError(f"{path} is no file of convert.py; other weights need a converter")
        if facts["format"] == _FORMATS[0]:
            facts.setdefault("class_names", [])
        wrong = [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]
        if wrong or not is_whole(facts["step"]):
            raise ValueError(f"{', '.join(wrong) or 'step'} missing or of a wrong type")
    except InputError:
        raise
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or no file of convert.py ({str(error)[:100]}); get it again") from None
    sealed = facts["format"] == _FORMATS[-1] or "digest" in facts
    if sealed and facts.get("digest") != digest_of({name: facts[name] for name in facts if name != "digest"}):
        raise InputError(f"{path} is damaged: its text is not what was written; get it again")
    return header, facts
