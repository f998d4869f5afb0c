"""Says by the names of files which are images, which are in a split, and which classes they have."""

import collections
import os
import posixpath
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from diffusion.errors import InputError, nearest, printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABELS = ("", "folders", "none")
LONGEST = 160  # characters of a name in a message
SHOWN = 10  # names, or kinds of file, in a message


def shown(name: str) -> str:
    """Returns a file's name as a message gives it: printable, and without the middle if it is very long."""
    half = LONGEST // 2
    return printable(name if len(name) <= LONGEST else f"{name[:half]} ... {name[-half:]}")


def some(names: Sequence[str], most: int = SHOWN) -> str:
    """Returns names with commas between them, and of many only the first, with the number of the others."""
    others = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + others


def inside(name: str) -> str:
    """Returns the name of a member of an archive in its plain form, as "a/b.png" for "./a//b.png".

    Raises:
      InputError: it leads out of the archive.
    """
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain == ".." or re.match(r"[A-Za-z]:/", plain):
        raise InputError(f"its member {shown(name)!r} lies outside the archive; pack the folder by relative names")
    return plain


def is_hidden(name: str) -> bool:
    """Says whether a file, or a folder that it lies in, is hidden, or made by macOS for itself."""
    return "/." in f"/{name}" or "__MACOSX/" in name


def is_image(name: str) -> bool:
    """Says whether a file is read as an image: it has one of SUFFIXES and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def kinds(names: Iterable[str]) -> str:
    """Counts files by their suffix, the most frequent first: "9 .heic, 2 .gif"; hidden files do not count."""
    suffixes = (posixpath.splitext(name)[1].lower() for name in names if not is_hidden(name))
    counts = collections.Counter(suffix or "without a suffix" for suffix in suffixes)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {shown(suffix)}" for suffix, count in ordered[:SHOWN]]
    rest = sum(count for _, count in ordered[SHOWN:])
    return ", ".join(parts + [f"{rest:,} others"] * bool(rest))


def common_folder(names: Sequence[str]) -> str:
    """Returns the innermost folder that holds all of the sorted names, as "a/b/", or "" if there is none."""
    common = os.path.commonprefix([names[0], names[-1]])  # noqa: RUF071 - cut to whole folders below
    return common[: common.rfind("/") + 1]


def split_folder(names: Sequence[str], split: str, path: str) -> str:
    """Returns the folder of a split, as "photos/train/"; it lies at the top or in the wrapping folder.

    Args:
      names: of the images, sorted.
      split: name of the folder; "" gives "".
      path: of the data set, for the error.

    Raises:
      InputError: there is no such folder.
    """
    if not split:
        return ""
    inner = common_folder(names)
    for folder in (f"{split}/", f"{inner}{split}/"):
        if any(name.startswith(folder) for name in names):
            return folder
    folders = {name[len(top) :].split("/")[0] for top in ("", inner) for name in names if "/" in name[len(top) :]}
    valid = nearest(printable(split), map(shown, folders)) if folders else "there are no sub-folders"
    raise InputError(f"{path} has no folder split={printable(split)!r} ({valid}); correct it, or leave it empty")


def classes(names: Sequence[str], labels: str = "") -> tuple[Int32[np.ndarray, "N"] | None, tuple[str, ...]]:
    """Returns each image's class and the names of the classes, or None and () where there are none.

    Below the folder that holds all images, the first folder of a name is its class, and folders in a class belong to
    it: in photos/cats/2023/1.jpg and photos/dogs/1.jpg the classes are cats and dogs.

    Args:
      names: of the images, sorted.
      labels: "" takes sub-folders as classes if there are any; "folders" does so even where folders of one name lie in
        two of them that have no images of their own, as cats in train and in test; "none" uses no classes.

    Raises:
      InputError: an image lies beside the class folders, or one name lies in two of them, or there are no sub-folders
        and labels is "folders".
    """
    if labels not in LABELS:
        raise InputError(
            f"unknown labels={labels!r}; {nearest(labels, LABELS[1:])}, or empty for folders if there are any"
        )
    top = common_folder(names)
    inner = [name[len(top) :].split("/") for name in names]
    folders = sorted({parts[0] for parts in inner if len(parts) > 1})
    if labels == "none" or (not folders and not labels):
        return None, ()
    if not folders:
        raise InputError("labels=folders asks for classes, but there are no sub-folders; leave it empty")
    if stray := [name for name, parts in zip(names, inner, strict=True) if len(parts) == 1]:
        raise InputError(
            f"{len(stray):,} of the images are beside the class folders ({some(folders)}): {some(stray)}; "
            "move them into a class folder, or set labels=none to train without classes"
        )
    if not labels:
        _refuse_one_name_in_two(top, inner)
    number = {folder: k for k, folder in enumerate(folders)}
    return np.array([number[parts[0]] for parts in inner], np.int32), tuple(folders)


def _refuse_one_name_in_two(top: str, inner: list[list[str]]) -> None:
    """Raises InputError where train/cats and test/cats leave open whether train and test are the classes or cats.

    A folder with images of its own is clearly a class, as in cats/1.jpg, cats/2023/2.jpg and dogs/2023/3.jpg.
    """
    clear = {parts[0] for parts in inner if len(parts) == 2}
    parents: dict[str, str] = {}
    for parent, name in ((parts[0], parts[1]) for parts in inner if len(parts) > 2 and parts[0] not in clear):
        first = parents.setdefault(name, parent)
        if first != parent:
            one, other = shown(top + first), shown(top + parent)
            raise InputError(
                f"a folder {shown(name)!r} lies both in {one} and in {other}, so it is not clear what the classes are; "
                f"set split={one} to use one of them, or labels=folders if {shown(first)} and {shown(parent)} are "
                "classes, or labels=none"
            )
