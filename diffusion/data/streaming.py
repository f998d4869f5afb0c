"""Reads batches ahead in threads or worker processes, which grain starts and keeps in order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from diffusion.errors import InputError
from diffusion.process import STOPPING

MAX_THREADS = 16  # more would only wait for the interpreter's lock; then workers help
SIGNALS = {signal.SIGINT, *STOPPING}
PATIENCE = 5.0  # seconds


def read_ahead(steps: Sequence, workers: int) -> Iterator:
    """Yields the items of steps in order; closing or dropping the iterator stops the threads or processes.

    Args:
      steps: makes a named tuple of arrays (or None) when it is indexed; is pickled to the workers, if there are any.
      workers: processes that read, each its share of the items; with 0, threads of this process read them.

    Raises:
      InputError: a worker died. An error in making an item is raised in its turn, after the items before it.
    """
    if not flags.FLAGS.is_parsed():  # as in a notebook; grain asks for absl flags of its own
        flags.FLAGS.mark_as_parsed()
    grain.config.update("py_traceback_filtering", "off")  # it would add lines to the one line of an InputError
    iterator = iter(_pipeline(steps, workers))
    others = multiprocessing.active_children()
    try:
        # Ctrl-C, a cluster's SIGTERM and a terminal's SIGHUP reach all processes of a job, but the workers must not die
        # of them: a run that stops in order still needs batches, and stops its workers itself. So a thread that blocks
        # these signals starts the workers, which inherit that.
        _start_tracker()
        with ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, SIGNALS)) as starter:
            item = starter.submit(next, iterator).result()

        while True:
            # Items come in shared memory. Copy them, so that it is freed at once however long the caller keeps them.
            item = type(item)(*(None if array is None else np.array(array) for array in item))
            yield item
            item = next(iterator)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise InputError(
            f"a process that reads images has died ({str(error).split('. ')[0]}); for 1 see the error above, -9 mostly "
            "means too little memory, -7 too little shared memory (docker run --shm-size): lower config.data.workers"
        ) from error
    finally:
        _close(iterator, others)


def _close(iterator, others):
    """Closes an iterator of grain's; after `PATIENCE` seconds kills its workers, as one that hangs would hang this."""
    closing = threading.Thread(target=iterator.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    if closing.is_alive():
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.kill()
        closing.join(PATIENCE)


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 1 if workers else min(cores, MAX_THREADS)
    items = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads))
    return items.mp_prefetch(grain.MultiprocessingOptions(workers), worker_init_fn=_prepare_worker)


def _prepare_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A process that is killed cannot stop its workers, and they would wait for it for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
