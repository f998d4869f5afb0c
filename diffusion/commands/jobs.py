"""Keeps sampling jobs on disk: which images they have, in which files, and which files are there already."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion import keys
from diffusion.commands.drawing import labels_of
from diffusion.errors import InputError
from diffusion.files import write_atomically, write_json
from diffusion.model import current_config

SHARD = 1000
"""The most images in one file."""

RECORD = "sampling.json"


def parse_ids(text: str) -> list[int]:
    """Returns the numbers that a text such as "0-63" or "5,7,100-199" lists, in the order written.

    Raises:
      InputError: the text is no such list, a range runs backwards, or a number comes twice.
    """
    ids: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**32 or last - first > 10**8:
            raise InputError(f"seeds are {text!r}; write numbers below 2^32 and ranges, as 0-63 or 5,7,100-199")
        ids.extend(range(first, last + 1))
    if len(set(ids)) != len(ids):
        raise InputError(f"seeds are {text!r}, where a number comes twice")
    return ids


class Job:
    """Stores the images of one job: in samples.npz, or above `SHARD` images in samples-00000-of-00050.npz and so on.

    Each file appears whole or not at all. A job that was killed goes on after the files it finds, if sampling.json
    says that they belong to it.

    Args:
      out: an existing folder.
      ids: the numbers of the images.
      record: everything that determines the images; kept in sampling.json.

    Attributes:
      replaces: how this job differs from the other one whose samples.npz it is about to replace; "" if there is none.

    Raises:
      InputError: the folder holds shards of another job.
    """

    def __init__(self, out: Path, ids: Sequence[int], record: Mapping[str, Any]):
        self.out = out
        self.shards = [ids[i : i + SHARD] for i in range(0, len(ids), SHARD)]
        self.record = {**record, "num": len(ids), "ids": _ranges(ids)}
        self.replaces = self._check_same()
        # A job that is killed needs its record to know its shards again. A single file is always drawn anew, so its
        # record can wait for `finish`.
        if len(self.shards) > 1:
            (out / "samples.npz").unlink(missing_ok=True)  # of the job that this one replaces
            write_json(out / RECORD, self.record)

    def path(self, index: int) -> Path:
        """Returns the file of a shard."""
        count = len(self.shards)
        return self.out / ("samples.npz" if count == 1 else f"samples-{index:05}-of-{count:05}.npz")

    def missing(self) -> list[int]:
        """Returns the numbers of the shards still to be drawn; a job of one file is always drawn anew."""
        return [i for i in range(len(self.shards)) if len(self.shards) == 1 or not self.path(i).exists()]

    def write(self, index: int, images: UInt8[np.ndarray, "N H W C"], labels: Sequence[int] = ()) -> None:
        """Writes a shard: samples, ids, and labels where there are classes."""
        ids = np.asarray(self.shards[index])
        arrays = {"samples": images, "ids": ids}
        if labels:
            arrays["labels"] = labels_of(ids, labels)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        # The record on disk describes the file that is replaced next, so it must not outlive it.
        if len(self.shards) == 1:
            (self.out / RECORD).unlink(missing_ok=True)
        write_atomically(self.path(index), buffer.getvalue())

    def images(self, index: int) -> UInt8[np.ndarray, "N H W C"]:
        """Reads the images of a shard that has been written."""
        with np.load(self.path(index)) as arrays:
            return arrays["samples"]

    def finish(self, **facts: Any) -> None:
        """Writes sampling.json: the record, and facts about how the job went."""
        write_json(self.out / RECORD, {**self.record, **facts})

    def _check_same(self):
        """Returns how this job differs from the one whose images are there, or ""; never mixes shards of two jobs."""
        shards = any(self.out.glob("samples-*-of-*.npz"))
        if not shards and not (self.out / "samples.npz").exists():
            return ""
        # Without a record that can be read, the images count as another job's.
        try:
            found = json.loads((self.out / RECORD).read_text())
        except (OSError, ValueError):
            found = {}
        found = found if isinstance(found, dict) else {}
        if isinstance(found.get("config"), dict):  # an earlier version may have written it
            found["config"] = json.loads(current_config(found["config"]).to_json())
        if found:
            found.setdefault("generator", keys.GENERATOR)  # as in all versions that did not record it
        wanted = json.loads(json.dumps(self.record))  # tuples become lists, as in the file
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if not different:
            return ""
        key = different[0]
        difference = f"{key} is {str(wanted[key])[:80]}, there {str(found.get(key))[:80]}"
        if shards:
            raise InputError(f"{self.out} holds images of another job ({difference}); name another folder with --out")
        return difference


def _ranges(ids):
    """Writes numbers as `parse_ids` reads them: [0, 1, 2, 7] as "0-2,7"."""
    edges = np.flatnonzero(np.diff(ids) != 1) + 1
    parts = np.split(np.asarray(ids), edges)
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
