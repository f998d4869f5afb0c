"""Reads batches ahead in threads or worker processes, which grain starts and keeps in order."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from diffusion import machine
from diffusion.errors import InputError
from diffusion.process import STOPPING

MAX_THREADS = 16  # more would only wait for the interpreter's lock; then workers help
SIGNALS = {signal.SIGINT, *STOPPING}
PATIENCE = 5.0  # seconds that workers get to end by themselves, and in which a stop waits for a batch on its way


class ReadAhead(Iterator):
    """Yields the items of a sequence in order, made by threads or processes; closing it takes 15 seconds at most.

    Nothing that hangs, such as a network disk that is gone, keeps the caller from signals or from closing: a thread of
    its own waits for the items.

    Raises:
      InputError: a worker died, or no item came after a stop was asked for. An error in making an item is raised in
        its turn, after the items before it.
    """

    def __init__(self, steps: Sequence, workers: int, stopping: Callable[[], bool] | None = None):
        """Takes what to read.

        Args:
          steps: makes a named tuple of arrays (or None) when it is indexed; is pickled to the workers, if any.
          workers: processes that read, each its share of the items; with 0, threads of this process read them.
          stopping: says whether the caller is asked to stop, and so waits no longer for an item that does not come.
        """
        if not flags.FLAGS.is_parsed():  # as in a notebook; grain asks for absl flags of its own
            flags.FLAGS.mark_as_parsed()
        grain.config.update("py_traceback_filtering", "off")  # it would add lines to the one line of an InputError
        self._stopping = stopping or (lambda: False)
        self._workers = workers
        self._items: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._before = set(multiprocessing.active_children())
        self._source = iter(_pipeline(steps, workers))
        self._thread = threading.Thread(target=self._fetch, daemon=True)

    def __next__(self):
        if self._thread.ident is None:
            self._thread.start()
        since = None
        while True:
            try:
                item, error = self._items.get(timeout=0.2)
            except queue.Empty:
                since = since or (time.monotonic() if self._stopping() else None)
                if since and time.monotonic() > since + PATIENCE:
                    raise InputError("no images came after the run was asked to stop; is their disk gone?") from None
                continue
            if error is not None:
                raise _explained(error, self._workers) from error
            return item

    def close(self) -> None:
        """Stops the threads or processes; kills processes that do not end by themselves."""
        if self._closed.is_set():
            return
        self._closed.set()
        closing = threading.Thread(target=self._source.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        if closing.is_alive():
            for process in set(multiprocessing.active_children()) - self._before:
                if process.name.startswith("grain"):
                    process.kill()
            closing.join(PATIENCE)
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def _fetch(self) -> None:
        """Puts (item, None) of each step in the queue, or (None, error) and ends."""
        # Ctrl-C and a cluster's SIGTERM reach all processes of a job, but the workers must not die of them: a run that
        # stops in order still needs batches, and stops its workers itself. So this thread, which starts the workers,
        # blocks these signals, and they inherit that.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _start_tracker()
        try:
            while not self._closed.is_set():
                item = next(self._source)
                # Items come in shared memory. Copies free it at once, however long the caller keeps them.
                self._put((type(item)(*(None if array is None else np.array(array) for array in item)), None))
        except BaseException as error:  # it belongs to the caller
            self._put((None, error))

    def _put(self, entry) -> None:
        while not self._closed.is_set():
            try:
                return self._items.put(entry, timeout=0.2)
            except queue.Full:
                continue


def _explained(error: BaseException, workers: int) -> BaseException:
    if not isinstance(error, RuntimeError) or "terminated unexpectedly" not in str(error):
        return error
    return InputError(
        f"a process that reads images has died ({str(error).split('. ')[0]}); for 1 see the error above, -9 mostly "
        "means too little memory, -7 too little shared memory (docker run --shm-size): give fewer than "
        f"workers={workers}"
    )


def _start_tracker() -> None:
    """Starts the process that frees what others leave in shared memory, and keeps it quiet.

    Otherwise it would start with the first worker and unblock the signals on its way; and after workers had to be
    killed, it would warn the user of each batch that it freed.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    resource_tracker.ensure_running()
    if before is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = before


def _pipeline(steps, workers):
    """Returns grain's iterable of the items, with no more threads than are of use."""
    threads = 1 if workers else min(machine.cores(), MAX_THREADS)
    items = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads))
    return items.mp_prefetch(grain.MultiprocessingOptions(workers), worker_init_fn=_prepare_worker)


def _prepare_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A process that is killed cannot stop its workers, and they would wait for it for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
