"""The batches of a training run: number k is a pure function of (seed, k, data), whoever loads it and however."""

import atexit
import dataclasses
import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diffusion.data import order
from diffusion.data.dataset import Dataset
from diffusion.errors import InputError, require_range


class Batch(NamedTuple):
    """images: uint8[b, H, W, C]; labels: int32[b], or None where the data has no classes."""

    images: np.ndarray
    labels: np.ndarray | None


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    flip: bool = False,
    rows: slice | range | None = None,
    workers: int = 0,
) -> "Batches":
    """Batches number start, start + 1, ... without end; or some rows of each, for a process that loads a share.

    Batch k holds the examples `batch_indices(N, batch_size, seed, k)`. A run resumed at step k starts here at k and
    needs nothing else. Data in memory is gathered when a batch is asked for; ImageFiles are read ahead.

    Args:
      dataset: images and labels.
      batch_size: of the global batch, at least 1; may exceed the data.
      seed: of the order and of flip, at least 0.
      start: number of the first batch.
      flip: mirror each image left to right in each epoch with probability 1/2, by (seed, epoch, image) alone.
      rows: places in the global batch to load, in order, at least one; None is all of them. Process p of n takes
        range(p * batch_size // n, (p + 1) * batch_size // n).
      workers: processes that read ImageFiles; 0 stands for threads of this one. Scripts that start processes need an
        `if __name__ == "__main__"`.

    Raises:
      InputError: an argument out of its range; from the iterator: an image that cannot be read, or a worker that died.
    """
    order.check(len(dataset.images), batch_size, seed, start)
    require_range("config.data.workers", workers, 0)
    steps = Steps(dataset, batch_size, seed, start, flip, _rows(rows, batch_size))
    if isinstance(dataset.images, np.ndarray):
        return Batches(map(steps.__getitem__, itertools.count()))
    from diffusion.data import streaming  # grain takes a second to import, which data in memory should not pay

    return Batches(streaming.read_ahead(steps, workers))


class Batches(Iterator[Batch]):
    """An endless iterator that stays dead once it has failed or is closed; `with` closes it and stops its workers."""

    def __init__(self, iterator: Iterator[Batch]):
        self._iterator = iterator
        self._end: BaseException | None = None
        # Called by close, when this is dropped, and at exit, where weakref's own hook may come after multiprocessing's.
        self._release = weakref.finalize(self, getattr(iterator, "close", lambda: None))
        atexit.register(self._release)

    def __next__(self) -> Batch:
        if self._end is not None:
            raise self._end
        try:
            return next(self._iterator)
        except BaseException as error:  # after any, Ctrl-C too, a batch may be lost, and the next one not be the next
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
    """A sequence of batches, each made when it is asked for; item i is batch number start + i."""

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
        chosen = images[index]
        if self.flip:
            mirrored = order.mirrored(count, self.seed, index, epoch)
            chosen[mirrored] = chosen[mirrored, :, ::-1]
        return Batch(chosen, None if labels is None else labels[index])


def _rows(rows: slice | range | None, batch_size: int) -> range:
    """rows as a range in 0..batch_size-1; raises InputError where it is empty or goes beyond."""
    if rows is None:
        return range(batch_size)
    if isinstance(rows, slice):  # not range(batch_size)[rows], which cuts off in silence what goes beyond
        rows = range(rows.start or 0, batch_size if rows.stop is None else rows.stop, rows.step or 1)
    if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise InputError(f"rows are {rows}; give at least one of a batch's, which are 0..{batch_size - 1}")
    return rows
