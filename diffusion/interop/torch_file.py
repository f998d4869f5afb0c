"""Reads files of `torch.save` without torch, and without running the code that a pickle may hold.

It reads both formats, the zip of torch 1.6 and later and the earlier stream of pickles, but nothing except tensors and
plain containers: a file that names any other class or function is refused before anything of it is built.
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""The classes of torch that hold numbers, and the kind of numbers in each."""

# A file of the earlier format starts with these two numbers.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read(path: str | os.PathLike) -> Any:
    """Returns what torch.save was given: dicts, lists and numbers, with a NumPy array in place of every tensor.

    Raises:
      InputError: there is no such file, or it is damaged, was written on a big-endian machine, or holds anything else.
    """
    try:
        content = Path(path).read_bytes()
        return _read_zip(content) if zipfile.is_zipfile(io.BytesIO(content)) else _read_legacy(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # damaged pickles raise nearly any exception
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is damaged or no file of torch.save ({reason}); get it again") from error


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns a file's state dict: tensors by their names.

    Raises:
      InputError: as for `read`, or the file holds something other than a state dict.
    """
    state = read(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in state.items()
    ):
        raise InputError(f"{path} holds no state dict with only tensors in it; save model.state_dict() with torch.save")
    return dict(state)


class _Unpickler(pickle.Unpickler):
    """Builds only dicts and arrays; `storage` is (key, dtype, number of elements) -> a flat array."""

    def __init__(self, file, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        # Made anew for each file, since a pickle may set attributes of the functions that it names.
        self._allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _rebuild_tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda *arguments: _require_array(arguments[0]),
            ("torch.nn.parameter", "Parameter"): lambda *arguments: _require_array(arguments[0]),
            # Strings, which a pickle cannot alter; it could alter a dtype, which all other code uses too.
            **{("torch", name): name for name in STORAGES},
        }

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise InputError(f"the file names {module}.{name}, which is no tensor; save a state dict of only tensors")
        return self._allowed[module, name]

    def persistent_load(self, pid):
        kind, name, key, _, count, *view = pid
        if kind != "storage" or name not in STORAGES or not isinstance(count, int) or count < 0:
            raise InputError("the file refers to something that is no storage of numbers; save a state dict")
        if any(part is not None for part in view):
            raise InputError("the file holds storages that are views of others; save it with a newer torch")
        return self._storage(str(key), STORAGES[name], count)


def _require_array(value):
    if not isinstance(value, np.ndarray):
        raise InputError("the file has a parameter without a tensor; it is damaged, get it again")
    return value


def _rebuild_tensor(storage, offset, size, stride):
    """Returns a tensor as a view of its storage, and refuses one that reaches beyond the storage or is larger."""
    # A damaged or hostile file may hold anything here, so check it before NumPy trusts it.
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
        raise InputError("the file has a tensor without a storage; it is damaged, get it again")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise InputError(f"the file has a tensor of offset, size and stride {numbers}; it is damaged, get it again")

    # No element may lie beyond the storage; nor may a stride of 0 make a huge tensor out of a few numbers.
    count = int(np.prod(size, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > len(storage) or (count and last >= len(storage)):
        raise InputError(f"the file has a tensor that exceeds its storage of {len(storage)} numbers; get it again")
    if not count:
        return np.zeros(size, storage.dtype)
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def _read_zip(content: bytes) -> Any:
    """Reads torch's zip: data.pkl holds the structure, and data/KEY the numbers of each storage."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise InputError(f"it is a zip with {len(names)} entries data.pkl, not one of torch.save's")
        top = names[0].removesuffix("data.pkl")
        if f"{top}byteorder" in archive.namelist() and archive.read(f"{top}byteorder") != b"little":
            raise InputError("it was written on a big-endian machine; write it again on another")
        storages: dict[str, np.ndarray] = {}

        def storage(key, dtype, count):
            if key not in storages:
                entry = archive.getinfo(f"{top}data/{key}")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
                    raise InputError(f"its storage {key!r} does not have the size of its tensors; get it again")
                storages[key] = np.frombuffer(archive.read(entry), dtype)
            return _same_kind(storages[key], dtype, count)

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _read_legacy(content: bytes) -> Any:
    """Reads torch's earlier format: five pickles one after another, and then the numbers of each storage."""
    file, storages = io.BytesIO(content), {}

    def storage(key, dtype, count):
        if count * dtype.itemsize > len(content):
            raise InputError("it breaks off; get it again")
        if key not in storages:
            storages[key] = np.zeros(count, dtype)  # filled below, as the numbers stand at the file's end
        return _same_kind(storages[key], dtype, count)

    def load():
        return _Unpickler(file, storage).load()

    # The header, then the structure, in which tensors are views of storages that are still empty.
    if load() != MAGIC or load() != PROTOCOL:
        raise InputError("it is no file of torch.save; get it again")
    if not load()["little_endian"]:
        raise InputError("it was written on a big-endian machine; write it again on another")
    result = load()

    # Fill the storages, and with them the tensors.
    keys = load()
    if sorted(keys) != sorted(storages):
        raise InputError("its list of storages does not match its tensors; it is damaged, get it again")
    for key in keys:
        array = storages[key]
        if int.from_bytes(file.read(8), "little") != len(array):
            raise InputError(f"its storage {key!r} does not have the size of its tensors; get it again")
        array[:] = np.frombuffer(file.read(array.nbytes), array.dtype)
    return result


def _same_kind(array, dtype, count):
    """Returns the array, unless a second tensor says that it has another dtype or size."""
    if array.dtype != dtype or len(array) != count:
        raise InputError("it has two kinds of numbers in one storage; it is damaged, get it again")
    return array
