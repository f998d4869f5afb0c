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
from typing import Any, BinaryIO, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion.errors import InputError
from diffusion.files import open_to_read
from diffusion.interop.zip_file import open_zip

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

FILE_LIMIT, STRUCTURE_LIMIT = 2**28, 2**22
"""The most bytes of a file unless a caller expects more, and of the pickle in it.

FID's Inception has 91 MiB. A pickle has about 200 bytes for each tensor, and takes up to 60 times its size as objects.
"""


def read(path: str | os.PathLike, limit: int = FILE_LIMIT) -> Any:
    """Returns what torch.save was given: dicts, lists and numbers, with a NumPy array in place of every tensor.

    The arrays take no more memory than the file.

    Raises:
      InputError: there is no such file, it has more bytes than the limit, or it is damaged, was written on a big-endian
        machine, or holds anything else.
    """
    try:
        with open_to_read(path) as file:
            size = check_size(file, limit)
            return _read_zip(file, size) if zipfile.is_zipfile(file) else _read_legacy(file, size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # damaged pickles raise nearly any exception
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is damaged or no file of torch.save ({reason}); get it again") from error


def check_size(file: BinaryIO, limit: int = FILE_LIMIT) -> int:
    """Returns how many bytes a file has; raises InputError if there are more than the limit."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise InputError(f"it has {size:,} bytes; {limit:,} are the limit")
    return size


def read_state_dict(path: str | os.PathLike, limit: int = FILE_LIMIT) -> dict[str, np.ndarray]:
    """Returns a file's state dict: tensors by their names; the limit is that of `read`.

    Raises:
      InputError: as for `read`, or the file holds something other than a state dict.
    """
    state = read(path, limit)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in state.items()
    ):
        raise InputError(f"{path} holds no state dict with only tensors in it; save model.state_dict() with torch.save")
    return dict(state)


_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID"),
)
"""The steps of a pickle that torch writes and that are done as Python does them; three more are below."""


class _Unpickler(pickle._Unpickler):
    """Builds only dicts and arrays; `storage` is (key, dtype, number of elements) -> a flat array.

    It is Python's unpickler in Python, not the one in C, which allocates whatever a file names as its memo's size.
    """

    dispatch: ClassVar = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(self, file, storage: Callable[[str, np.dtype, int], np.ndarray]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        # Made anew for each file, since a pickle may set attributes of the functions that it names.
        self._allowed = {
            ("collections", "OrderedDict"): lambda: collections.OrderedDict(),
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
        # Nothing that is no text may be compared or printed: nested tuples can be as large as they like.
        if not all(isinstance(text, str) for text in (kind, name, key)) or type(count) is not int or count < 0:
            raise InputError("the file refers to something that is no storage of numbers; save a state dict")
        if kind != "storage" or name not in STORAGES:
            raise InputError("the file refers to something that is no storage of numbers; save a state dict")
        if any(part is not None for part in view):
            raise InputError("the file holds storages that are views of others; save it with a newer torch")
        return self._storage(key, STORAGES[name], count)

    def _set_items(self):
        items = self.pop_mark()
        self._put(items)

    def _set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _put(self, items):
        """Sets items of the dict on the stack; hashing a key that is a nested tuple could take forever."""
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str | int) for key in items[::2]):
            raise pickle.UnpicklingError("it has a dict whose keys are no texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _build(self):
        """Leaves out the attributes that torch gives to its dict."""
        self.stack.pop()
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise pickle.UnpicklingError("it sets attributes of something other than a dict")

    dispatch |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _build}


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
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise InputError("the file has a tensor whose offset, size or stride cannot be; it is damaged, get it again")

    # No element may lie beyond the storage; nor may a stride of 0 make a huge tensor out of a few numbers.
    count = int(np.prod(size, dtype=object))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > len(storage) or (count and last >= len(storage)):
        raise InputError(f"the file has a tensor that exceeds its storage of {len(storage)} numbers; get it again")
    if not count:
        return np.zeros(size, storage.dtype)
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def _read_zip(file: BinaryIO, size: int) -> Any:
    """Reads torch's zip: data.pkl holds the structure, and data/KEY the numbers of each storage."""
    with open_zip(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise InputError(f"it is a zip with {len(names)} entries data.pkl, not one of torch.save's")
        top = names[0].removesuffix("data.pkl")
        left = [size]  # what storages may still take: members can lie over each other

        def content(name, length):
            # Torch does not compress, and what is compressed could be of any size.
            entry = archive.getinfo(f"{top}{name}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise InputError(f"its entry {name!r} is compressed; write it again with torch.save")
            if length not in (None, entry.file_size):
                raise InputError(f"its entry {name!r} does not have the size of its tensors; get it again")
            if entry.file_size > (STRUCTURE_LIMIT if length is None else left[0]):
                raise InputError(f"its entry {name!r} has {entry.file_size:,} bytes; get it again")
            left[0] -= entry.file_size
            return archive.read(entry)

        if f"{top}byteorder" in archive.namelist() and content("byteorder", None) != b"little":
            raise InputError("it was written on a big-endian machine; write it again on another")
        storages: dict[str, np.ndarray] = {}

        def storage(key, dtype, count):
            if key not in storages:
                storages[key] = np.frombuffer(content(f"data/{key}", count * dtype.itemsize), dtype)
            return _same_kind(storages[key], dtype, count)

        return _Unpickler(io.BytesIO(content("data.pkl", None)), storage).load()


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Reads torch's earlier format: five pickles one after another, and then the numbers of each storage."""
    storages: dict[str, np.ndarray] = {}
    left = [size]
    file.seek(0)
    head = io.BytesIO(file.read(STRUCTURE_LIMIT))

    def storage(key, dtype, count):
        if key not in storages:
            left[0] -= count * dtype.itemsize
            if left[0] < 0:
                raise InputError("it breaks off; get it again")
            storages[key] = np.zeros(count, dtype)  # filled below, as the numbers stand at the file's end
        return _same_kind(storages[key], dtype, count)

    def load():
        return _Unpickler(head, storage).load()

    # The header, then the structure, in which tensors are views of storages that are still empty.
    if load() != MAGIC or load() != PROTOCOL:
        raise InputError("it is no file of torch.save; get it again")
    if not load()["little_endian"]:
        raise InputError("it was written on a big-endian machine; write it again on another")
    result = load()

    # Fill the storages, and with them the tensors.
    keys = load()
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise InputError("its list of storages does not match its tensors; it is damaged, get it again")
    file.seek(head.tell())
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
