"""Makes the batches of a training run: batch k depends only on (seed, k, data), not on who loads it or how."""

import atexit
import dataclasses
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from diffusion.data import order
from diffusion.data.dataset import Dataset
from diffusion.data.latents import Latents
from diffusion.errors import InputError


class Batch(NamedTuple):
    """Holds the examples of one step: images 0..255, or moments of latents; labels, None for data without classes."""

    images: UInt8[np.ndarray, "b H W C"] | Float32[np.ndarray, "b h w 2*c"]
    labels: Int32[np.ndarray, "b"] | None


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    flip: bool = False,
    rows: slice | range | None = None,
    workers: int = 0,
    stopping: Callable[[], bool] | None = None,
) -> "Batches":
    """Returns batches number start, start + 1, ... without end, or only some rows of each.

    Batch k holds the examples `batch_indices(N, batch_size, seed, k)`. A run resumed at step k passes start=k and
    needs nothing else. Data in memory is gathered when a batch is asked for; ImageFiles are read ahead.

    Args:
      dataset: images and labels.
      batch_size: examples in the global batch, at least 1; may exceed the data set.
      seed: decides the order and which images are mirrored, at least 0.
      start: number of the first batch.
      flip: mirror each image left to right with probability 1/2 in each epoch; depends only on (seed, epoch, image).
      rows: places in the global batch to load, in order, at least one; None loads all. Process p of n takes its share,
        range(p * batch_size // n, (p + 1) * batch_size // n).
      workers: processes that read ImageFiles; with 0, threads of this process read them. A script that starts
        processes needs an `if __name__ == "__main__"`.
      stopping: says whether a stop was asked for. Then a batch that is not there in 5 seconds is an error, as a disk
        that is gone would keep the caller waiting for ever.

    Raises:
      InputError: an argument is out of its range. The iterator raises it if an image cannot be read or a worker died.
    """
    order.check(len(dataset.images), batch_size, seed, start)
    if workers < 0:
        raise InputError(f"workers={workers} is out of range; it must be at least 0")
    steps = Steps(dataset, batch_size, seed, start, flip, _rows(rows, batch_size))
    if isinstance(dataset.images, np.ndarray | Latents):
        return Batches(map(steps.__getitem__, itertools.count()))
    from diffusion.data import streaming  # slow, and data in memory does not need it

    return Batches(streaming.ReadAhead(steps, workers, stopping))


class Batches(Iterator[Batch]):
    """Yields batches without end, but none after it failed or was closed; `with` closes it and stops its workers."""

    def __init__(self, iterator: Iterator[Batch]):
        self._iterator = iterator
        self._end: BaseException | None = None
        # Runs at close, when this object is dropped, and at exit. atexit calls it too, as weakref's own hook for the
        # exit may come after multiprocessing's.
        self._release = weakref.finalize(self, getattr(iterator, "close", lambda: None))
        atexit.register(self._release)

    def __next__(self) -> Batch:
        if self._end is not None:
            raise self._end
        try:
            return next(self._iterator)
        except BaseException as error:  # after any error, Ctrl-C too, a batch may be lost and the order broken
            self._end = error
            self._release()
            raise

    def close(self) -> None:
        """Stops threads and worker processes; may be called twice."""
        self._end = self._end or InputError("the batches are closed; call batches() again")
        self._release()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Steps:
    """Makes each batch when it is asked for, as a sequence: item i is batch number start + i."""

    dataset: Dataset
    batch_size: int
    seed: int
    start: int
    flip: bool
    rows: range

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> Batch:
        images, labels, count = self.dataset.images, self.dataset.labels, len(self.dataset.images)
        index, epoch = order.locate(count, self.batch_size, self.seed, self.start + int(i), self.rows)
        mirrored = order.mirrored(count, self.seed, index, epoch) if self.flip else None
        if isinstance(images, Latents):
            return Batch(images.take(index, mirrored), None if labels is None else labels[index])
        chosen = images[index]
        if mirrored is not None:
            chosen[mirrored] = chosen[mirrored, :, ::-1]
        return Batch(chosen, None if labels is None else labels[index])


def _rows(rows: slice | range | None, batch_size: int) -> range:
    """Returns rows as a range within 0..batch_size-1; raises InputError if it is empty or goes beyond."""
    if rows is None:
        return range(batch_size)
    chosen = rows
    if isinstance(rows, slice):
        # Python cuts a slice off where it goes beyond the batch, in silence.
        beyond = any(end is not None and not -batch_size <= end <= batch_size for end in (rows.start, rows.stop))
        chosen = range(0) if beyond or rows.step == 0 else range(batch_size)[rows]
    if not chosen or not 0 <= min(chosen) <= max(chosen) < batch_size:
        raise InputError(f"rows are {rows}; give at least one row, all within 0..{batch_size - 1}")
    return chosen
