"""What a ranking has measured so far, so that the same command goes on after a stop."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion import files
from diffusion.sealed import digest_of
from diffusion.solvers import SamplerTable

ROWS, SOLUTION = "ranking.rows.jsonl", "ranking.solution.npz"


class Ranked:
    """The rows and the solution of a ranking that is not complete, in two files that its end removes."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        """Reads what a ranking of the same facts has left in a folder; what another one left gives way.

        Args:
          out: the folder.
          facts: everything that determines a row besides its table and its noises, for JSON.
        """
        self._out, self._identity, self._found = out, digest_of(dict(facts)), {}
        text = files.read(out / ROWS, within=out).decode(errors="replace") if (out / ROWS).exists() else ""
        lines = text.splitlines()
        if lines[:1] == [self._identity]:
            for line in lines[1:]:
                try:
                    name, squares = json.loads(line)
                except (ValueError, TypeError):  # the line that was being written when it stopped
                    break
                self._found[name] = squares
        kept = [self._identity, *(json.dumps(row) for row in self._found.items())]
        files.write_atomically(out / ROWS, "".join(f"{line}\n" for line in kept).encode(), out)

    def __len__(self) -> int:
        """Counts the rows, of which a sampler that was run twice has two."""
        return len(self._found)

    def squares(self, table: SamplerTable, ids: range) -> Float[np.ndarray, "N"] | None:
        """Returns the row of a table on these noises, or None."""
        found = self._found.get(_name(table, ids))
        return None if found is None else np.array(found)

    def add(self, table: SamplerTable, ids: range, squares: Float[np.ndarray, "N"]) -> None:
        """Writes a row down."""
        line = json.dumps([_name(table, ids), squares.tolist()]) + "\n"
        with files.open_to_append(self._out / ROWS, self._out) as rows:
            rows.write(line.encode())

    def solution(self, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples of half as many steps and of all, made or as they were left."""
        path = self._out / SOLUTION
        try:
            with files.open_to_read(path, self._out) as file, np.load(file) as kept:
                if str(kept["identity"]) == self._identity:
                    return kept["half"], kept["whole"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # there is none, or none that can be read
            pass
        half, whole = make()
        with files.open_atomically(path, self._out) as file:
            np.savez(file, identity=np.array(self._identity), half=half, whole=whole)
        return half, whole

    def remove(self) -> None:
        """Removes both files; the ranking is complete."""
        for name in (ROWS, SOLUTION):
            files.remove(self._out / name, self._out)


def _name(table, ids):
    """Returns what tells a table on noises from any other."""
    parts = [np.ascontiguousarray(part).tobytes() for part in (table.t, table.signal, table.noise, table.update)]
    return f"{hashlib.sha256(b''.join(parts)).hexdigest()} {ids.start}-{ids.stop}"
