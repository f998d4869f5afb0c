"""Adds LoRA files to the weights of a pipeline while they are read: W + scale alpha / rank up down (arXiv:2106.09685).

Files of kohya's scripts and of diffusers are read, peft's names among theirs.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.files import read_json
from diffusion.interop.diffusers import folders
from diffusion.interop.safetensors_file import read_header

UNET, TEXT = "unet", "text_encoder"
"""The parts of a pipeline that a file can change."""

_BASE = "base_model.model."
"""What names in files of peft itself begin with, before any other prefix."""

_PREFIXES = {"lora_unet_": UNET, "lora_te_": TEXT, "unet.": UNET, "text_encoder.": TEXT, "text_model.": TEXT}
"""What names begin with: the first two in kohya's files, where "_" stands for "."; those of none are of the UNet."""

_MATRIX = re.compile(r"(.+?)[._](?:lora_linear_layer|lora)[._](down|up|A|B)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}

_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps what peft knows of a LoRA."""

_PLAIN = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias", "use_qalora")
"""What peft can do besides, and this cannot."""


LARGEST_SCALE = 1000
"""Of a LoRA; usual ones lie in -2..2, and with much larger ones weights overflow."""


class Change(NamedTuple):
    """What one layer gets added.

    Attributes:
      down: [rank, in] or [rank, in, k, k].
      up: [out, rank] or [out, rank, 1, 1].
      factor: scale alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the weight that it is added to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def value(self) -> np.ndarray:
        """Returns what is added, in float32."""
        down, up = self.down.reshape(len(self.down), -1), self.up.reshape(len(self.up), -1)
        return (self.factor * (np.float32(up) @ np.float32(down))).reshape(self.shape).astype(np.float32)


class Lora(NamedTuple):
    """A file.

    Attributes:
      where: its path, for errors.
      changes: of UNET and of TEXT, by the names of layers as the file has them.
    """

    where: str
    changes: Mapping[str, Mapping[str, Change]]


def read(path: str | os.PathLike, scale: float = 1.0) -> Lora:
    """Reads a LoRA.

    Args:
      path: .safetensors, or a file of torch.save with tensors only.
      scale: how much of it is added; 1 for all.

    Raises:
      InputError: it cannot be read, is damaged, or holds anything but a LoRA of the usual kind.
    """
    path = Path(path).expanduser()
    if not abs(scale) <= LARGEST_SCALE:
        raise InputError(
            f"the scale of LoRA {path} is {scale:g}; give -{LARGEST_SCALE}..{LARGEST_SCALE}, and 1 for all"
        )
    if not path.is_file():
        raise InputError(f"there is no LoRA file {path}; check the path")
    weights = folders.open_file(path)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in weights.shapes:
        matrix, alpha = (form.fullmatch(name.removeprefix(_BASE)) for form in (_MATRIX, _ALPHA))
        if matrix is None and alpha is None:
            raise InputError(
                f"{path} holds {name!r}, which is no part of a LoRA; supported: files of kohya and diffusers"
            )
        layer, side = (matrix[1], _SIDES[matrix[2]]) if matrix else (alpha[1], "alpha")
        if side in parts.setdefault(layer, {}):
            raise InputError(f"{path} has {side} of {layer} twice, in two spellings; get the file again")
        parts[layer][side] = _real(path, name, weights.read(name))
    if not parts:
        raise InputError(f"{path} is empty; get it again")
    of_peft = any(name.startswith(_BASE) for name in weights.shapes)
    alphas, changes = _alphas_of_peft(path) if of_peft else _known_alphas(path), {UNET: {}, TEXT: {}}
    for layer, found in parts.items():
        kind = next((kind for prefix, kind in _PREFIXES.items() if layer.startswith(prefix)), UNET)
        changes[kind][layer] = _change(path, layer, found, alphas.get(kind), scale)
    return Lora(str(path), changes)


def _real(path, name, array):
    """Returns a tensor of a LoRA; refuses one of whole numbers, which a quantized file has."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{path}: {name} is of {array.dtype}, and a LoRA is of real numbers; get one in float16 or 32")
    return array


def _change(path, layer, found, alpha, scale):
    """Returns what the tensors of a layer add."""
    if not {"down", "up"} <= found.keys():
        raise InputError(f"{path}: {layer} has only {', '.join(sorted(found))} of down and up; get the file again")
    down, up = found["down"], found["up"]
    fits = (
        down.ndim == up.ndim
        and down.ndim in (2, 4)
        and min(down.shape + up.shape) > 0
        and up.shape[1] == len(down)
        and up[0, 0].size <= 1
    )
    if not fits:
        raise InputError(f"{path}: {layer} has down of {down.shape} and up of {up.shape}, which do not fit each other")
    if "alpha" in found:
        alpha = float(np.float32(found["alpha"]).reshape(-1)[0]) if found["alpha"].size == 1 else np.nan
    factor = scale * (1.0 if alpha is None else alpha / len(down))
    change = Change(down, up, factor)
    if not all(np.isfinite(np.float32(part)).all() for part in (down, up, factor)):
        raise InputError(f"{path}: {layer} is not finite; get the file again")
    return change


def _known_alphas(path):
    """Returns the alphas of a file's parts that diffusers wrote beside the tensors; without them alpha is the rank."""
    if path.suffix != ".safetensors" or _METADATA not in (metadata := read_header(path).metadata):
        return {}
    try:
        known = json.loads(metadata[_METADATA])
        _refuse_other_kinds(path, known)
        return {kind: float(known[f"{kind}.lora_alpha"]) for kind in (UNET, TEXT) if f"{kind}.lora_alpha" in known}
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has no readable {_METADATA}; get it again") from None


def _alphas_of_peft(path):
    """Returns the alpha in the config that peft writes beside a file of its own, for both parts."""
    config = path.with_name("adapter_config.json")
    try:
        known = read_json(config)
        _refuse_other_kinds(config, known)
        return dict.fromkeys((UNET, TEXT), float(known["lora_alpha"]))
    except OSError:
        raise InputError(f"{path} is of peft, which keeps the alpha in {config.name}; put that beside it") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{config} holds no lora_alpha of a LoRA; get it again") from None


def _refuse_other_kinds(where, known):
    """Raises InputError for what a config asks of peft that is more than a LoRA."""
    if used := [name for name in known if name.rpartition(".")[2] in _PLAIN and known[name]]:
        raise InputError(
            f"{where} has {used[0]} {known[used[0]]!r}, which is not supported; merge it with its own tool"
        )


def merged(weights: folders.Weights, kind: str, loras: Iterable[Lora]) -> folders.Weights:
    """Returns weights to whose tensors what LoRAs change is added when they are read.

    Args:
      weights: of a part of a pipeline.
      kind: which, UNET or TEXT.
      loras: the files.

    Raises:
      InputError: a file changes a layer that there is not, or one of another shape.
    """
    layers = {name.removesuffix(".weight"): name for name in weights.shapes if name.endswith(".weight")}
    layers |= {layer.replace(".", "_"): name for layer, name in layers.items()}
    added: dict[str, list[Change]] = {}
    for lora in loras:
        spelled: dict[str, str] = {}
        for layer, change in lora.changes[kind].items():
            name = layers.get(_plain(layer))
            if name is None or not _same(change.shape, weights.shapes[name]):
                what = "which this model has not" if name is None else f"of shape {tuple(weights.shapes[name])} here"
                raise InputError(
                    f"{lora.where} is a LoRA for another model: it changes {layer} by {change.shape}, {what}"
                )
            if name in spelled:
                raise InputError(
                    f"{lora.where} changes one layer twice, as {spelled[name]} and as {layer}; get it again"
                )
            spelled[name] = layer
            added.setdefault(name, []).append(change)

    def read_merged(name):
        array = weights.read(name)
        for change in added.get(name, ()):
            array = np.float32(array) + change.value().reshape(array.shape)
        return array

    return weights._replace(read=read_merged)


def _plain(layer: str) -> str:
    """Returns the name of a layer without what stands before it, and as the files of networks have it."""
    for prefix in (*_PREFIXES, "text_model.", "text_model_"):
        layer = layer.removeprefix(prefix)
    # As diffusers wrote them before it used peft: attn1.processor.to_q_lora.
    layer = layer.replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _same(change: Sequence[int], weight: Sequence[Any]) -> bool:
    """Tells whether shapes are the same, where a dense layer may be a convolution of one pixel."""
    return [n for n in change if n != 1] == [n for n in weight if n != 1] and change[0] == weight[0]


def unused(loras: Iterable[Lora], kinds: Sequence[str]) -> None:
    """Raises InputError if a file changes a part that a model has not."""
    for lora in loras:
        for kind, changes in lora.changes.items():
            if changes and kind not in kinds:
                raise InputError(
                    f"{lora.where} is a LoRA for another model: it changes a {kind}, and there is none here"
                )
