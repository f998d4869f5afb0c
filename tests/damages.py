"""Damages files and folders as disks, strangers and careless hands do; each function changes one path, given a rng."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

OUTSIDE = b"what a user keeps elsewhere\n" * 40
"""The content of the files beside a run folder to which links lead."""


def make_outside(folder: Path) -> None:
    """Makes the folder `outside` with what no program may change."""
    (folder / "outside" / "6").mkdir(parents=True)
    for name in ("thesis.tex", "6/photo.png"):
        (folder / "outside" / name).write_bytes(OUTSIDE)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Returns what is in a folder, by its path in it: the kind, rights, time and content of each file."""

    def facts(path):
        found = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
        return found.st_mode, stat.S_ISDIR(found.st_mode) or found.st_mtime_ns, content

    return {str(path.relative_to(folder)): facts(path) for path in sorted(folder.rglob("*"))}


def entries(folder: Path) -> Iterator[Path]:
    """Yields every file and folder below a folder, in one order on all machines."""
    for path in sorted(folder.rglob("*")):
        yield path.relative_to(folder)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path, rng):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path, rng):
    path.write_bytes(b"")


def _delete(path, rng):
    _remove(path)


def _folder(path, rng):
    _remove(path)
    path.mkdir()
    (path / "a").write_bytes(b"a")


def _file(path, rng):
    _remove(path)
    path.write_bytes(b"hello\n")


def _pipe(path, rng):
    _remove(path)
    os.mkfifo(path)


def _device(path, rng):
    _remove(path)
    path.symlink_to("/dev/zero")


def _link(path, rng):
    outside = next(parent / "outside" for parent in path.parents if (parent / "outside").is_dir())
    target = outside if path.is_dir() else outside / "thesis.tex"
    _remove(path)
    path.symlink_to(target)


def _dangling(path, rng):
    _remove(path)
    path.symlink_to("nowhere")


def _noise(path, rng):
    path.write_bytes(rng.randbytes(200))


def _other_json(path, rng):
    path.write_text(json.dumps(rng.choice([[], {}, 3, None, "text", {"a": [1, {"b": None}]}, [[[]]], {"rows": 5}])))


def _closed(path, rng):
    path.chmod(0)


OF_FILES = {
    "a flipped bit": _flip,
    "cut in half": _cut,
    "empty": _empty,
    "deleted": _delete,
    "a folder in its place": _folder,
    "a pipe in its place": _pipe,
    "a device in its place": _device,
    "a link to a file outside": _link,
    "a link to nothing": _dangling,
    "noise": _noise,
    "other JSON": _other_json,
}
OF_FILES |= {} if os.geteuid() == 0 else {"no right to read it": _closed}
"""What can befall a file: functions (path, rng) by name."""

OF_FOLDERS = {
    "deleted": _delete,
    "a file in its place": _file,
    "a pipe in its place": _pipe,
    "a link to a folder outside": _link,
    "a link to nothing": _dangling,
}
"""What can befall a folder."""
