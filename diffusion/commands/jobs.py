"""Keeps sampling jobs on disk: which images they have, in which files, and which files are there already."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion import files, keys
from diffusion.commands.drawing import labels_of
from diffusion.errors import InputError
from diffusion.evaluation.samples import (
    CHECKSUMS,
    RECORD,
    SHARDS,
    SINGLE,
    TEXT_LIMIT,
    add_checksum,
    read_checksums,
    read_file,
    sha256_of,
    write_checksums,
    write_ids,
)
from diffusion.images import write_png
from diffusion.records import current_config, readable
from diffusion.sealed import digest_of

SHARD, TEXT_SHARD = 1000, 10
"""The most images in one file; of a text-to-image model, whose images take longer."""

PNG, EXPORT = r"\d{6,10}\.png", "arr_0.npz"
TEMPORARIES = r"samples.*\.npz|samples\.sha256|sampling\.json|grid\.png|trajectory\.gif|arr_0\.npz"
PICTURES = ("grid.png", "trajectory.gif", "png", EXPORT)
"""What else lies beside the images; PNG is a regular expression for the files in the folder png."""


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
    """Stores the images of one job: in samples.npz, or above `shard` images in samples-00000-of-00050.npz and so on.

    Each file appears whole or not at all, and its SHA-256 goes into samples.sha256. A job that was killed goes on after
    the files that are as they were written, if sampling.json says that they belong to it. Only one process may work in
    a folder at a time, see `files.locked`.

    Args:
      out: an existing folder.
      ids: the numbers of the images.
      record: everything that determines the images; kept in sampling.json.
      shard: the most images in one file; 0 for `SHARD`.

    Attributes:
      replaces: how this job differs from the other one whose samples.npz it is about to replace; "" if there is none.
      damaged: the names of files that are drawn again because they are not what was written.

    Raises:
      InputError: the folder holds shards of another job, or one file where this job has shards; or a link lies where
        the program writes.
    """

    def __init__(self, out: Path, ids: Sequence[int], record: Mapping[str, Any], shard: int = 0):
        self.out = out
        shard = shard or SHARD
        self.shards = [ids[i : i + shard] for i in range(0, len(ids), shard)]
        self.record = {**record, "num": len(ids), "ids": write_ids(ids)}
        for name in (RECORD, CHECKSUMS, *PICTURES, *(self.path(i).name for i in range(len(self.shards)))):
            files.refuse_links(out / name, out)
        self.replaces = self._check_same()
        files.remove_temporaries(out, TEMPORARIES, out)
        files.remove_temporaries(out / "png", PNG, out)
        # A single file is always drawn anew, so its record and checksum can wait until it is there.
        self._sums, self.damaged = {}, []
        if len(self.shards) > 1:
            self._sums, self.damaged = self._verify()
            files.write_json(out / RECORD, self.record, out)
            write_checksums(out, self._sums)

    def path(self, index: int) -> Path:
        """Returns the file of a shard."""
        count = len(self.shards)
        return self.out / (SINGLE if count == 1 else f"samples-{index:05}-of-{count:05}.npz")

    def missing(self) -> list[int]:
        """Returns the numbers of the shards still to be drawn; a job of one file is always drawn anew."""
        return [i for i in range(len(self.shards)) if len(self.shards) == 1 or self.path(i).name not in self._sums]

    def write(self, index: int, images: UInt8[np.ndarray, "N H W C"], labels: Sequence[int] = ()) -> None:
        """Writes a shard: samples, ids, and labels where there are classes."""
        ids = np.asarray(self.shards[index])
        arrays = {"samples": images, "ids": ids}
        if labels:
            arrays["labels"] = labels_of(ids, labels)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        content, path = buffer.getvalue(), self.path(index)
        # The record on disk describes the file that is replaced next, so it must not outlive it.
        if len(self.shards) == 1:
            files.remove(self.out / RECORD, self.out)
        files.write_atomically(path, content, self.out)
        self._sums[path.name] = hashlib.sha256(content).hexdigest()
        if len(self.shards) == 1:
            write_checksums(self.out, self._sums)
        else:
            add_checksum(self.out, path.name, self._sums[path.name])

    def images(self, index: int) -> UInt8[np.ndarray, "N H W C"]:
        """Reads the images of a shard that has been written."""
        return read_file(self.path(index), sys.maxsize).images  # written or verified by this process

    def remove_pictures(self) -> None:
        """Removes the pictures and the export of the job that this one replaces, and nothing else that lies there."""
        files.remove_matching(self.out / "png", PNG, self.out)
        with contextlib.suppress(OSError):  # not there, or it holds files of the user
            (self.out / "png").rmdir()
        for name in ("trajectory.gif", EXPORT):
            files.remove(self.out / name, self.out)

    def write_pngs(self) -> None:
        """Writes every image as png/NUMBER.png."""
        files.make_folder(self.out / "png", self.out)
        for index, ids in enumerate(self.shards):
            for number, image in zip(ids, self.images(index), strict=True):
                write_png(self.out / "png" / f"{number:06}.png", image)

    def export(self) -> None:
        """Writes arr_0.npz for other people's evaluators: all images as `arr_0`, and their classes as `arr_1`.

        It takes the memory of one shard, whatever the number of images.
        """
        path = self.out / EXPORT
        with files.open_atomically(path, self.out) as file, zipfile.ZipFile(file, "w") as archive:
            for entry, place in (("arr_0.npy", 0), ("arr_1.npy", 2)):
                # Images and labels of Samples, one file at a time.
                parts = (read_file(self.path(i), sys.maxsize)[place] for i in range(len(self.shards)))
                first = next(parts)
                if first is None:
                    continue
                shape = (self.record["num"], *first.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
                # ZipInfo has no time of its own, so that the same images make the same file.
                with archive.open(zipfile.ZipInfo(entry), "w", force_zip64=True) as array:
                    np.lib.format.write_array_header_1_0(array, header)
                    for part in itertools.chain([first], parts):
                        array.write(np.ascontiguousarray(part).tobytes())

    def finish(self, **facts: Any) -> None:
        """Writes sampling.json: the record, and facts about how the job went, which are named in `_FACTS`."""
        write_checksums(self.out, self._sums)
        files.write_json(self.out / RECORD, {**self.record, **facts}, self.out)

    def _verify(self):
        """Returns (SHA-256 by name of the shards that are as they were written, names of those that are not)."""
        known, names = read_checksums(self.out), [self.path(i).name for i in range(len(self.shards))]
        there = [name for name in names if os.path.lexists(self.out / name)]
        good = {name: known[name] for name in there if known.get(name) == sha256_of(self.out / name)}
        return good, [name for name in there if name not in good]

    def _check_same(self):
        """Returns how this job differs from the one whose images are there, or ""; never mixes images of two jobs."""
        shards = [path.name for path in self.out.iterdir() if re.fullmatch(SHARDS, path.name)]
        single = (self.out / SINGLE).exists()
        if single and len(self.shards) > 1:
            raise InputError(f"{self.out} holds {SINGLE} of another job; name another folder with --out")
        difference = _difference(comparable(self.record), self._found()) if shards or single else ""
        if shards and difference:
            raise InputError(f"{self.out} holds images of another job ({difference}); name another folder with --out")
        return difference

    def _found(self):
        """Returns the record that is there, in today's form; what cannot be read counts as another job's."""
        try:
            found = files.read_json(self.out / RECORD, TEXT_LIMIT, self.out)
        except (OSError, InputError):
            return {}
        if not isinstance(found, dict):
            return {}
        if isinstance(found.get("config"), dict):
            try:
                with readable(RECORD):
                    found["config"] = json.loads(current_config(found["config"]).to_json())
            except InputError:
                return {}
        return comparable(found)


_FACTS = {"seconds_with_compilation", "devices", "versions", "calls_of_an_image"}
"""What the record of a finished job says of how it went."""


def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what determines the images in a record, with lists for tuples as in the file.

    The weights are known by their SHA-256, and so is a table from a file. So it does not matter how a path is spelled.
    """
    left_out = _FACTS | ({"run", "sampler"} if "table_sha256" in record else {"run"})
    record = {"generator": keys.GENERATOR, **record}  # as in all versions that did not record it
    return json.loads(json.dumps({key: value for key, value in record.items() if key not in left_out}))


def identity_of(record: Mapping[str, Any]) -> str:
    """Returns 64 hex digits that are the same for records of the same images."""
    return digest_of(comparable(record))


def _difference(wanted, found):
    """Returns in words how two records differ, or ""."""
    if found and (more := sorted(found.keys() - wanted.keys())):
        return f"its record has {more[0]}, this job has none"
    for key in wanted:
        if key not in found:
            return f"its record has no {key}: an earlier version began it, or it is damaged" if found else "no record"
        if found[key] != wanted[key]:
            texts = [str(value) for value in (wanted[key], found[key])]
            if all(re.fullmatch(r"[0-9a-f]{64}", text) for text in texts):
                return f"another {key.removesuffix('_sha256')}"
            return f"{key} is {texts[0][:80]}, there {texts[1][:80]}"
    return ""
