"""Writes and checks SHA-256 manifests: which files a folder holds, and whether they are still what was written."""

import hashlib
import json
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write(folder: Path, **facts: Any) -> None:
    """Writes the size and SHA-256 of every file below the folder, with other facts, to its manifest.json."""
    content = {"files": {name: _describe(folder / name) for name in _names(folder)}, **facts}
    # The manifest protects itself: its last line is the SHA-256 of the lines before.
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    (folder / NAME).write_text(text + _digest(text.encode()) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Returns what `write` wrote: the facts, and "files" with the size and SHA-256 of each.

    Raises:
      ValueError: there is no manifest, or it is damaged.
      OSError: it cannot be read now.
    """
    try:
        *lines, digest = (folder / NAME).read_text().splitlines(keepends=True)
    except (FileNotFoundError, ValueError) as error:  # UnicodeDecodeError is a ValueError, and so is an empty file
        raise ValueError(f"{NAME} is missing or unreadable") from error
    text = "".join(lines)
    if digest != _digest(text.encode()) + "\n":
        raise ValueError(f"{NAME} is damaged")
    return json.loads(text)


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
        if _describe(folder / name) != expected[name]:
            raise ValueError(f"{name} is damaged")
    return content


def _names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / NAME)


def _describe(path):
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content):
    return hashlib.sha256(content).hexdigest()
