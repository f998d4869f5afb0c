"""Batches read ahead by threads or by worker processes. Grain starts them and keeps their order."""

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

MAX_THREADS = 16  # more wait for the interpreter's lock; more workers help then
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def read_ahead(steps: Sequence, workers: int) -> Iterator:
    """The items of steps in order; closing or dropping the iterator stops what reads them.

    Args:
      steps: named tuples of arrays (or None), made by indexing; pickled to the workers, if any.
      workers: processes that share the items among them; 0 reads them in threads of this one.

    Raises:
      InputError: a worker died. What indexing raises comes in its turn, after the items before it.
    """
    if not flags.FLAGS.is_parsed():  # in a notebook; grain reads flags of its own
        flags.FLAGS.mark_as_parsed()
    grain.config.update("py_traceback_filtering", "off")  # which adds lines to the one line of an InputError
    iterator = iter(_pipeline(steps, workers))
    try:
        # Ctrl-C and a cluster's SIGTERM reach all processes of a job, but a run that stops in order still needs
        # batches, and stops its workers itself. So they inherit the blocked signals of the thread that starts them.
        _start_tracker()
        with ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, SIGNALS)) as starter:
            item = starter.submit(next, iterator).result()
        while True:
            # Copied out of the shared memory in which it came, so that this is freed at once, whoever holds on to it.
            item = type(item)(*(None if array is None else np.array(array) for array in item))
            yield item
            item = next(iterator)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise InputError(
            f"a process that reads images has died ({str(error).split('. ')[0]}); 1 has its error printed above, -9 is "
            "mostly a lack of memory, -7 of shared memory (docker run --shm-size): lower config.data.workers"
        ) from error
    finally:
        iterator.close()


def _start_tracker() -> None:
    """Starts the process that frees what others leave in shared memory, quietly.

    It would start with the first worker, unblock the signals on its way, and later tell the user of each batch that it
    freed after workers had to be killed.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    resource_tracker.ensure_running()
    if before is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = before


def _pipeline(steps, workers):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 1 if workers else min(cores, MAX_THREADS)
    items = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads))
    return items.mp_prefetch(grain.MultiprocessingOptions(workers), worker_init_fn=_prepare_worker)


def _prepare_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A process that was killed cannot stop its workers; they would wait for it for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
