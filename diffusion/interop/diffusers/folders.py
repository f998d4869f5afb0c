"""Finds and reads what lies in a folder of diffusers: its configs, and its weights, whatever files they are in."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from diffusion.errors import InputError
from diffusion.files import open_to_read, read_json
from diffusion.interop import torch_file
from diffusion.interop.diffusers import hub
from diffusion.interop.safetensors_file import read_header, read_tensors

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"

STEM = "diffusion_pytorch_model"
"""What files of weights are called, before their variant and suffix."""

_STEMS = MappingProxyType({"safetensors": STEM, "bin": STEM})

TEXT_STEMS = MappingProxyType({"safetensors": "model", "bin": "pytorch_model"})
"""What files of the weights of a text encoder are called, by their suffixes."""

_PARTS = {"": _STEMS, **dict.fromkeys(("unet", "transformer", "vae", "vqvae"), _STEMS), "text_encoder": TEXT_STEMS}
"""The folders of a pipeline that hold weights; a network or autoencoder alone, and early pipelines, have no folder."""

_CONFIGS = (INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", "tokenizer/*.json", "tokenizer/*.txt")
_CONFIGS += tuple(f"{part}/{CONFIG}".lstrip("/") for part in _PARTS)
"""What is read of a pipeline besides weights."""

_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """The tensors of a network.

    Attributes:
      where: the file or index, for errors.
      shapes: of the tensors by name.
      read: name -> the tensor.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def local(name: str | os.PathLike, variant: str | None = "") -> Path:
    """Returns the folder that a name stands for, which for a model of the Hub is fetched first, as far as it is read.

    Args:
      name: of a folder, or the id of a model, see `hub.is_id`.
      variant: of the weights that are fetched, see `open_weights`; None for configs only.

    Raises:
      InputError: see `hub.fetch`, or it is no model of diffusers.
    """
    if not hub.is_id(name):
        return Path(name).expanduser()
    folder = hub.fetch(os.fspath(name), _CONFIGS)
    if not is_folder(folder):
        raise InputError(f"{name} on the Hugging Face Hub is no model of diffusers; give the id of one that is")
    if variant is None:
        return folder
    lacking = [(folder / part, _kinds(stems, variant)) for part, stems in _PARTS.items()]
    lacking = [(at, kinds) for at, kinds in lacking if (at / CONFIG).is_file()]
    while lacking:
        wanted = [at / pattern for at, kinds in lacking for pattern in kinds[0].patterns]
        hub.fetch(os.fspath(name), [path.relative_to(folder).as_posix() for path in wanted])
        lacking = [(at, kinds[1:]) for at, kinds in lacking if kinds[1:] and not (at / kinds[0].name).is_file()]
    return folder


class _Kind(NamedTuple):
    """One kind of files that weights may lie in.

    Attributes:
      suffix: of those with the weights.
      name: of the file that has them all, or of the index of several.
      patterns: of the names of all files.
    """

    suffix: str
    name: str
    patterns: Sequence[str]


def _kinds(stems, variant):
    """Returns the kinds of files that the weights of a network may lie in; the first that is there is taken."""
    found = []
    for dot in [f".{variant}"] if variant else ["", ".fp16"]:
        for suffix, stem in stems.items():
            whole, index, number = f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json", "[0-9]" * 5
            shards = f"-{number}-of-{number}"
            parts = [index, f"{stem}{dot}{shards}.{suffix}", f"{stem}{shards}{dot}.{suffix}"]
            found += [_Kind(suffix, whole, [whole]), _Kind(suffix, index, parts)]
    return found


def is_folder(path: str | os.PathLike) -> bool:
    """Tells whether a folder holds a pipeline or a network of diffusers; the id of a model of the Hub counts as one."""
    if hub.is_id(path):
        return True
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return True
    try:
        return isinstance(read_json(path / CONFIG), dict) and "_class_name" in read_json(path / CONFIG)
    except (OSError, InputError):
        return False


def whole(path: str | os.PathLike) -> Path | None:
    """Returns the folder of the pipeline that a folder is a part of, or None for any other."""
    path = Path(path).expanduser()
    return path.parent if (path.parent / INDEX).is_file() and not (path / INDEX).is_file() else None


def refuse_part(path: str | os.PathLike) -> None:
    """Raises InputError if a folder is a part of a pipeline, for a part that serves for nothing by itself."""
    if (parent := whole(path)) is not None:
        raise InputError(f"{path} is a part of the pipeline in {parent}; name that folder instead")


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config; raises InputError if it is not there, or says of no class what it is."""
    config = read_fields(path)
    if not isinstance(config.get("_class_name"), str):
        raise InputError(f"{path} is no config of diffusers, it names no _class_name; name a folder of save_pretrained")
    return config


def read_fields(path: Path) -> dict[str, Any]:
    """Reads a config, of diffusers or of transformers; raises InputError if it is not there, or no object of JSON."""
    try:
        config = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); get the whole folder again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is no config of diffusers, it holds no fields; name a folder of save_pretrained")
    return config


def part(folder: Path, name: str) -> Path:
    """Returns the folder of a pipeline's part; early pipelines have their parts in the folder itself."""
    return folder / name if (folder / name).is_dir() else folder


def open_weights(folder: Path, numbers: int, variant: str = "", stems: Mapping[str, str] = _STEMS) -> Weights:
    """Opens the weights of a network.

    Args:
      folder: of the network.
      numbers: how many it has; much larger files of torch are not read.
      variant: as fp16; "" for the full precision, or fp16 where there is nothing else.
      stems: what the files are called, by their suffixes.

    Raises:
      InputError: there are none, they are damaged, incomplete, or hold something other than tensors.
    """
    kinds = _kinds(stems, variant)
    for kind in kinds:
        if (folder / kind.name).is_file():
            return _open(folder / kind.name, kind.suffix, numbers)
    found = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".msgpack"))
    also = f"; it has {', '.join(found)[:200]}" if found else ""
    raise InputError(
        f"{folder} holds no weights {kinds[0].name} or .bin, nor an index of them{also}; get the whole folder"
    )


def open_file(path: Path) -> Weights:
    """Opens the tensors of one file, safetensors by its name and otherwise of torch.save, of at most 256 MiB then.

    Raises:
      InputError: there is no such file, it is damaged, or holds something other than tensors.
    """
    return _open(path, "safetensors" if path.suffix == ".safetensors" else "bin", 0)


def _open(path, suffix, numbers):
    """Opens a file, or all files that an index names."""
    try:
        files = [path] if path.suffix != ".json" else _listed(path)
        for file in files:
            _refuse_pointer(file)
        parts = [_open_safetensors(file) if suffix == "safetensors" else _open_torch(file, numbers) for file in files]
    except OSError as error:
        missing = error.filename or path
        raise InputError(f"{missing} cannot be read ({error.strerror or error}); get the whole folder again") from None
    readers = {name: found.read for found in parts for name in found.shapes}
    if len(readers) < sum(len(found.shapes) for found in parts):
        raise InputError(f"{path} names files that have tensors in common; get the whole folder again")
    shapes = {name: shape for found in parts for name, shape in found.shapes.items()}
    return Weights(str(path), shapes, lambda name: readers[name](name))


def _listed(path):
    """Returns the files that an index names, which lie beside it."""
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{path} is no index of weights, it has no weight_map; get the whole folder again")
    files = sorted(set(names.values()))
    if not files or not all(re.fullmatch(r"[\w.-]+", name) and name[0] != "." for name in files):
        raise InputError(f"{path} names files outside its folder; get the whole folder again")
    return [path.parent / name for name in files]


def _refuse_pointer(path):
    with open_to_read(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(f"{path} is a pointer of git lfs and not the weights; run `git lfs pull` in its folder")


def _open_safetensors(path):
    header = read_header(path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    return Weights(str(path), shapes, lambda name: read_tensors(path, {name: header.tensors[name]})[name])


def _open_torch(path, numbers):
    # Eight bytes are the most that a number takes, and a file has little besides.
    state = torch_file.read_state_dict(path, 8 * numbers + torch_file.FILE_LIMIT)
    return Weights(str(path), {name: array.shape for name, array in state.items()}, state.__getitem__)


def count(shapes: Any) -> int:
    """Counts the numbers of arrays, or of what has their shapes."""
    return sum(math.prod(leaf.shape) for leaf in shapes)
