"""Collects the members of an archive, under the names by which a folder would have them."""

import posixpath
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion.data import names
from diffusion.errors import InputError

MAX_LINKS = 40  # links from link to link, as on Linux


class Listed(NamedTuple):
    """What is in a folder or an archive.

    Attributes:
      images: names of the image files, sorted, with "/" between folders.
      places: int64 [N, k], where each of them lies; the last column is its size in bytes; None for a folder.
      others: names of the files that are no images.
      repeated: how many links lead to a folder that is read under its own name.
    """

    images: list[str]
    places: np.ndarray | None
    others: list[str]
    repeated: int


class Listing:
    """Takes members one by one in the archive's order; of members of one name the last one counts, as in unpacking."""

    def __init__(self, columns: int):
        """Takes the number of columns of a place."""
        self._columns = columns
        self._places = array("q")  # flat: an archive of a few MiB can have millions of members
        self._files: dict[str, int] = {}
        self._links: dict[str, str] = {}
        self._refused: dict[str, str] = {}

    def add(self, name: str, *place: int) -> None:
        """Adds a file by its place, of which the last number is its size."""
        self._new(name)
        self._files[name] = len(self._places) // self._columns
        self._places.extend(place)

    def add_same(self, name: str, other: str) -> None:
        """Adds a hard link: another name of a file that was added before."""
        number, refused = self._files.get(other), self._refused.get(other)
        if number is None:
            missing = f"it is a link to {names.shown(other)!r}, which is not before it in the archive"
            self.refuse(name, refused or missing)
        else:
            self._new(name)
            self._files[name] = number

    def add_link(self, name: str, target: str) -> None:
        """Adds a symbolic link, which leads from its own folder to the target."""
        self._new(name)
        self._links[name] = target

    def refuse(self, name: str, reason: str) -> None:
        """Adds a member that cannot be read; `listed` raises the reason if it is an image."""
        self._new(name)
        self._refused[name] = reason

    def listed(self) -> Listed:
        """Returns what the archive holds.

        Raises:
          InputError: an image cannot be read, or a link leads out of the archive; the message names the member.
        """
        repeated = self._follow_links() if self._links else 0
        for name, reason in self._refused.items():
            if names.is_image(name):
                raise InputError(f"its member {names.shown(name)!r} cannot be read: {reason}; pack the folder again")
        images = sorted(filter(names.is_image, self._files))
        chosen = [self._files[name] for name in images]
        places = np.frombuffer(self._places, np.int64).reshape(-1, self._columns)[chosen]
        others = [name for name in (*self._files, *self._refused) if not names.is_image(name)]
        return Listed(images, places, others, repeated)

    def _new(self, name):
        for members in (self._files, self._links, self._refused):
            members.pop(name, None)

    def _follow_links(self):
        """Gives each link to a file the place of that file; returns how many links lead to folders."""
        folders = {name[:i] for name in self._files for i, c in enumerate(name) if c == "/"} | {"."}
        if below := next((name for name in (*self._files, *self._links) if self._parent_link(name)), None):
            raise InputError(f"its member {names.shown(below)!r} lies below a link; pack the folder again")
        repeated = 0
        for name, target in list(self._links.items()):
            found = self._resolve(posixpath.dirname(name), target)
            if found in folders:
                repeated += not names.is_hidden(name)
            elif found is None and not names.is_hidden(name):
                raise InputError(
                    f"its member {names.shown(name)!r} is a link to {names.shown(target)!r}, outside the archive; "
                    "pack the folder again with the files in place of the links (tar --dereference)"
                )
            elif found in self._files:
                self._files[name] = self._files[found]
            else:
                self._refused[name] = self._refused.get(
                    found, f"it is a link to {names.shown(target)!r}, which is not in the archive"
                )
        return repeated

    def _parent_link(self, name):
        return any(name[:i] in self._links for i, c in enumerate(name) if c == "/")

    def _resolve(self, folder: str, target: str) -> str | None:
        """Returns the name of what a link in a folder leads to, or None where that is outside the archive."""
        done: list[str] = [part for part in folder.split("/") if part]
        ahead: Sequence[str] = target.split("/")
        if target.startswith("/"):
            return None
        ahead, links = list(reversed(ahead)), 0
        while ahead:
            part = ahead.pop()
            if part == ".." and not done:
                return None
            if part == "..":
                done.pop()
            elif part not in ("", "."):
                done.append(part)
            inner = self._links.get("/".join(done)) if done else None
            if inner is not None:
                links += 1
                if inner.startswith("/"):
                    return None
                if links > MAX_LINKS:
                    return "\0"  # no member has this name: a circle leads nowhere
                done.pop()
                ahead.extend(reversed(inner.split("/")))
        return "/".join(done) or "."
