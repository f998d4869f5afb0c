"""Opens, locks, writes and deletes files: whole or not at all, and never through a link or a pipe that a stranger laid.

A run folder may come from anybody. So what the programs do below one goes through this module, with `within` naming
the folder that the user chose: that one may be a link, and nothing below it may.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from diffusion.errors import InputError

READ_LIMIT, JSON_LIMIT = 2**26, 2**24
"""The most bytes that `read` and `read_json` take unless told otherwise; JSON takes twenty times that as objects."""

_TEMPORARY = r"\.{name}\.[0-9a-f]{{8}}\.unfinished"


def refuse_links(path: str | os.PathLike, within: str | os.PathLike) -> None:
    """Raises InputError if anything on the way from a folder to a path below it is a link, the path itself included.

    Args:
      path: lies below `within`; it need not be there.
      within: the folder that the user named, which may be a link itself.
    """
    at = Path(within)
    for part in Path(path).relative_to(at).parts:
        at /= part
        if at.is_symlink():
            raise InputError(
                f"{at} is a link, and below {within} nothing is written or deleted through links: put the file or "
                "folder itself there"
            )


def open_to_read(path: str | os.PathLike, within: str | os.PathLike | None = None) -> BinaryIO:
    """Opens a regular file for reading; a pipe or device neither holds this up nor is read.

    Args:
      path: the file.
      within: where given, no link between this folder and the file is followed.

    Raises:
      InputError: it is no regular file, or behind such a link.
      OSError: it is not there, or cannot be opened.
    """
    return os.fdopen(_open(path, os.O_RDONLY, within), "rb")


def open_to_append(path: str | os.PathLike, within: str | os.PathLike | None = None) -> BinaryIO:
    """Opens a regular file that exists for appending; raises as `open_to_read` does."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND, within), "ab")


def create(path: str | os.PathLike, within: str | os.PathLike | None = None) -> BinaryIO:
    """Makes a file that is not there yet, and opens it for writing; raises FileExistsError, or as `open_to_read`."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, within), "wb")


def _open(path, flags, within):
    if within is not None:
        refuse_links(path, within)
        flags |= os.O_NOFOLLOW
    # Without O_NONBLOCK a pipe would be waited for. It changes nothing for a regular file.
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path} is no regular file; move it away")
    return handle


def read(path: str | os.PathLike, limit: int = READ_LIMIT, within: str | os.PathLike | None = None) -> bytes:
    """Reads a whole regular file; raises InputError if it has more than `limit` bytes, else as `open_to_read` does."""
    with open_to_read(path, within) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, which no file of its kind has; move it away")
    return content


def read_json(path: str | os.PathLike, limit: int = JSON_LIMIT, within: str | os.PathLike | None = None) -> Any:
    """Reads a JSON file; raises InputError if it is no JSON, else as `read` does."""
    try:
        return json.loads(read(path, limit, within))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # what is nested a thousand times deep ends in RecursionError
        raise InputError(f"{path} is damaged, or no JSON file ({error}); move it away") from None


def make_folder(path: str | os.PathLike, within: str | os.PathLike | None = None) -> None:
    """Makes a folder with its parents unless it is there; raises InputError if a part below `within` is a link."""
    if within is not None:
        refuse_links(path, within)
    Path(path).mkdir(parents=True, exist_ok=True)


def write_atomically(path: str | os.PathLike, content: bytes, within: str | os.PathLike | None = None) -> None:
    """Writes a file whole or not at all, by renaming a temporary one beside it, which is removed if anything fails.

    A link of that name is itself replaced, and the file that it points to stays as it is. The umask decides who may
    read the file, as everywhere.

    Args:
      path: the file.
      content: all of it.
      within: where given, a link between this folder and the file is refused.

    Raises:
      InputError: there is such a link.
      OSError: the file cannot be written.
    """
    with open_atomically(path, within) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike, within: str | os.PathLike | None = None) -> Iterator[BinaryIO]:
    """Opens a file to be written part by part; it appears whole when the context ends, as with `write_atomically`."""
    path = Path(path)
    if within is not None:
        refuse_links(path, within)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)  # so that `remove_temporaries` leaves it
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # missing if a signal came just after the renaming
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_json(
    path: str | os.PathLike, record: Mapping[str, Any] | Sequence[Any], within: str | os.PathLike | None = None
) -> None:
    """Writes a readable JSON file as `write_atomically` does; NaN and infinity, which JSON lacks, become null."""
    write_atomically(path, (json.dumps(_finite(record), indent=2, allow_nan=False) + "\n").encode(), within)


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove(path: str | os.PathLike, within: str | os.PathLike | None = None) -> None:
    """Removes a file if it is there; of a link in its place the target stays, and links to its folder are refused."""
    path = Path(path)
    if within is not None:
        refuse_links(path.parent, within)
    path.unlink(missing_ok=True)


def remove_matching(folder: str | os.PathLike, name: str, within: str | os.PathLike | None = None) -> None:
    """Removes the files in a folder whose whole name a regular expression describes; no folders, and nothing deeper.

    Args:
      folder: need not be there.
      name: of files that the caller itself writes, such as r"\\d{6}\\.png".
      within: as for `remove`.
    """
    for path in _named(folder, name, within):
        path.unlink(missing_ok=True)


def remove_temporaries(folder: str | os.PathLike, name: str, within: str | os.PathLike | None = None) -> None:
    """Removes what killed processes left of `write_atomically`, but no file that a process is writing.

    Args:
      folder: need not be there.
      name: a regular expression for the names of the files that were written.
      within: as for `remove`.
    """
    for path in _named(folder, _TEMPORARY.format(name=f"(?:{name})"), within):
        with contextlib.suppress(OSError, InputError), unused(path, unknown=False) as free:
            if free:
                path.unlink()


def _named(folder, name, within):
    """Returns the paths in a folder, if it is there, whose name a regular expression describes; no folders."""
    folder = Path(folder)
    if within is not None:
        refuse_links(folder, within)
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if re.fullmatch(name, path.name) and not path.is_dir()]


def remove_folder(path: str | os.PathLike, within: str | os.PathLike | None = None) -> None:
    """Removes a folder that the caller has made, if it is there, but not what links in it point to."""
    if within is not None:
        refuse_links(path, within)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def keep_aside(path: str | os.PathLike, within: str | os.PathLike | None = None) -> Path:
    """Renames a file to a free name beside it, metrics.csv to metrics-kept-1.csv, and returns where it is now."""
    path = Path(path)
    if within is not None:
        refuse_links(path, within)
    names = (path.with_name(f"{path.stem}-kept-{count}{path.suffix}") for count in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    return aside


def sync(path: str | os.PathLike) -> None:
    """Puts a file, or the names in a folder, on disk, in case the machine loses power."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | os.PathLike) -> None:
    """Puts a folder with all that is in it on disk."""
    for path in [*Path(folder).rglob("*"), folder]:
        sync(path)


@contextlib.contextmanager
def in_use(path: str | os.PathLike) -> Iterator[None]:
    """Keeps a file from those who ask `unused` before they remove it; what cannot be opened or locked is not kept.

    Any number of processes may use a file, which may have gone just before.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, InputError):
            file = stack.enter_context(open_to_read(path))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def unused(path: str | os.PathLike, unknown: bool) -> Iterator[bool]:
    """Yields whether nobody has the file `in_use`; while the `with` block lasts nobody begins to.

    Where the file system has no locks, so that nobody can know, it yields `unknown`.
    """
    with open_to_read(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # as on some network file systems
            yield unknown
            return
        yield True


class Lock:
    """Stands for a lock that this process holds on a folder; see `locked`."""

    def __init__(self, path: Path, handle: int):
        self._path, self._handle = path.absolute(), handle

    def is_ours(self) -> bool:
        """Says whether the folder is still the one that was locked, and was neither moved away nor removed."""
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a disk may be away for a moment
        return os.path.samestat(found, os.fstat(self._handle))


@contextlib.contextmanager
def locked(folder: str | os.PathLike, what: str, name: str = ".lock") -> Iterator[Lock]:
    """Makes the folder, and holds a lock that keeps other processes from doing the same work in it.

    Args:
      folder: where the lock lies.
      what: the work, for the error message: "training in", "measuring into".
      name: of the lock file. It is made if it is not there, and its content is never touched.

    Raises:
      InputError: another process holds the lock, or the lock file is a link or no regular file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = _open(folder / name, os.O_RDWR | os.O_CREAT, within=folder)
    try:
        lock = Lock(folder / name, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is {what} {folder}; wait for it, or name another folder") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}); let no two processes work there", stacklevel=3
            )
        if not lock.is_ours():
            raise InputError(f"{folder} was moved or removed just now; start again")
        yield lock
    finally:
        os.close(handle)
