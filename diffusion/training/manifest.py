"""Writes and checks SHA-256 manifests: which files a folder holds, and whether they are still what was written."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from diffusion import files
from diffusion.errors import InputError

NAME = "manifest.json"


def write(folder: Path, **facts: Any) -> None:
    """Writes the size and SHA-256 of every file below the folder, with other facts, to its manifest.json."""
    content = {"files": {name: _describe(folder / name) for name in _names(folder)}, **facts}
    # The manifest protects itself: its last line is the SHA-256 of the lines before.
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with files.create(folder / NAME, folder) as file:
        file.write((text + _digest(text.encode()) + "\n").encode())


def read(folder: Path) -> dict[str, Any]:
    """Returns what `write` wrote: the facts, and "files" with the size and SHA-256 of each.

    Raises:
      ValueError: there is no manifest, or it is damaged.
      OSError: it cannot be read now.
    """
    try:
        *lines, digest = files.read(folder / NAME, within=folder).decode().splitlines(keepends=True)
    except (FileNotFoundError, ValueError) as error:  # UnicodeDecodeError is a ValueError, and so is an empty file
        raise ValueError(f"{NAME} is missing or unreadable") from error
    text = "".join(lines)
    if digest != _digest(text.encode()) + "\n":
        raise ValueError(f"{NAME} is damaged")
    try:
        content = json.loads(text)
        content["files"].keys()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is no manifest") from error  # though whoever wrote it gave it the right sum
    return content


def verify(folder: Path) -> dict[str, Any]:
    """Compares every file with the folder's manifest, and returns the manifest.

    Raises:
      ValueError: a file is missing, was added or changed; the message names it.
      OSError: a file cannot be read now.
    """
    content = read(folder)
    expected, found = content["files"], set(_names(folder))
    for name in sorted(found | set(expected)):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} does not belong there")
        if not _is_as_described(folder / name, folder, expected[name]):
            raise ValueError(f"{name} is damaged")
    return content


def odd_names(folder: Path) -> list[str]:
    """Returns the names of what lies below a folder and is neither a file nor a folder: links, pipes and devices."""
    paths = ((path, path.lstat().st_mode) for path in folder.rglob("*"))
    odd = (path for path, mode in paths if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode))
    return sorted(path.relative_to(folder).as_posix() for path in odd)


def _names(folder):
    """Returns the names of everything below a folder but folders: links and pipes too, which belong in none."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / NAME)


def _is_as_described(path, folder, wanted):
    try:
        with files.open_to_read(path, folder) as file:
            size = os.fstat(file.fileno()).st_size
            return size == wanted["bytes"] and hashlib.file_digest(file, "sha256").hexdigest() == wanted["sha256"]
    except (InputError, LookupError, TypeError):  # a link or a pipe, or a manifest that a stranger made up
        return False


def _describe(path):
    with files.open_to_read(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content):
    return hashlib.sha256(content).hexdigest()
