"""Writes checkpoints in the background, gives them their numbers, and removes old ones.

A save is written under another name, is read back, gets its SHA-256 manifest, and then its number by one renaming.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from diffusion import files
from diffusion.errors import InputError
from diffusion.training import checkpoints, manifest
from diffusion.training.state import TrainState

_UNFINISHED, _DAMAGED = "unfinished-", "damaged-"
_REMAINS = re.compile(rf"{_UNFINISHED}(removal-)?\d+(\.orbax-checkpoint-tmp(-\d+)?)?")


class CheckpointWriter:
    """Saves the train state in the background. Leaving the context waits for the last save.

    Args:
      folder: where the folders of all steps lie. Remains of saves that were cut short are removed from it.
      keep: how many of the newest steps stay; older ones are removed when a newer one is complete.
      keep_best: how many of the steps with the lowest loss stay as well.
      begin: the step that the run goes on from. Later ones, which are damaged (see `newest_good`), are renamed to
        damaged-<step>, so that they do not count as the newest. None renames none.
      is_ours: says whether the folder is still the one that this run began in, see `files.Lock`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int,
        keep_best: int = 0,
        begin: int | None = None,
        is_ours: Callable[[], bool] = lambda: True,
    ):
        self._folder = Path(folder).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._is_ours = is_ours
        self._last = begin  # the last step that is known to be in the folder
        self._pending: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        checkpoints.require_plain_path(folder)
        if jax.process_index() == 0:
            files.make_folder(self._folder, self._folder.parent)
            remove_unfinished(self._folder)
            for step in checkpoints.steps(self._folder):
                if begin is not None and step > begin:
                    aside = self._folder / f"{_DAMAGED}{step}"
                    files.remove_folder(aside, self._folder)
                    os.rename(self._folder / str(step), aside)

    def save(
        self,
        step: int,
        state: TrainState,
        metadata: Mapping[str, Any],
        loss: float = math.nan,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save in the background, after the save before; raises the error of that save if it had one.

        Args:
          step: number of training steps made, more than in any save before.
          state: may be donated as soon as this returns.
          metadata: a mapping that JSON can hold.
          loss: what keep_best ranks steps by; one that is not finite is never the best.
          record: from `Recorder.seal`; a resumed run checks the files of its record against it.

        Raises:
          InputError: the disk is full or cannot be written, and checkpoints that are already there stay whole; or the
            folder was moved or removed.
        """
        self.wait()
        self.require_ours()
        temporary = self._folder / f"{_UNFINISHED}{step}"
        items = checkpoints.items_of(state)
        try:
            saving = ocp.save_checkpointables_async(temporary, items, custom_metadata=json.loads(json.dumps(metadata)))
        except checkpoints.REASONS as error:
            self._fail(error)
        written = {name: checkpoints.leaves(item) for name, item in items.items()}
        facts = {"step": step, "loss": loss if math.isfinite(loss) else None, "record": dict(record or {})}
        self._pending = self._thread.submit(self._finish, saving, temporary, written, facts)

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except checkpoints.REASONS as error:
            self._fail(error)

    def require_ours(self) -> None:
        """Raises InputError if the folder was moved or removed since the start, so that another may be in its place."""
        if self._is_ours():
            return
        saved = "no step was saved" if self._last is None else f"step {self._last} is the last that was saved there"
        raise InputError(
            f"{self._folder.parent} was moved or removed while it was trained in; {saved}. To go on, start again with "
            "its new place as --workdir"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, saving, temporary, written, facts):
        # Every process waits for its own part, and the first then completes the checkpoint.
        saving.result()
        if jax.process_index() > 0:
            return
        self.require_ours()
        stored = ocp.checkpointables_metadata(temporary).metadata or {}
        if {name: checkpoints.leaves(stored.get(name)) for name in written} != written:
            raise ValueError("what was written does not read back")
        manifest.write(temporary, **facts)
        files.sync_tree(temporary)
        self.require_ours()
        os.rename(temporary, self._folder / str(facts["step"]))
        files.sync(self._folder)
        self._last = facts["step"]
        self._remove_old()

    def _remove_old(self):
        """Removes the steps that need not be kept; not what lacks a manifest, as no run has written that."""
        saved = checkpoints.steps(self._folder)
        best = sorted((loss, step) for step in saved if (loss := _loss(self._folder, step)) is not None)
        kept = {self._last, *saved[-self._keep :], *(step for _, step in best[: self._keep_best])}
        for step in saved:
            path = self._folder / str(step)
            if step in kept or not (path / manifest.NAME).is_file():
                continue
            # Renamed first, so that a kill in the middle of removing leaves no half of a checkpoint.
            removed = self._folder / f"{_UNFINISHED}removal-{step}"
            with files.unused(path / manifest.NAME, unknown=True) as free:
                if free:  # or else somebody reads it, and it goes after a later save
                    os.rename(path, removed)
            files.remove_folder(removed, self._folder)

    def _fail(self, error):
        if isinstance(error, InputError):
            raise error
        self.require_ours()
        remove_unfinished(self._folder)  # where the disk is full that gives some space back
        saved = checkpoints.steps(self._folder)
        left = f"step {saved[-1]} is the last good one" if saved else "there is no earlier one"
        raise InputError(
            f"a checkpoint could not be written to {self._folder} ({checkpoints.first_line(error)}); {left}; "
            "see that the disk works and has space, and start again with the same command"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Removes what saves that were cut short left in a folder of checkpoints, if it is there."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        if _REMAINS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            files.remove_folder(path, folder.parent)


def _loss(folder, step):
    """Returns the loss that was saved with a step, or None if there is none or it cannot be read."""
    try:
        loss = manifest.read(folder / str(step))["loss"]
    except checkpoints.REASONS:
        return None
    return loss if isinstance(loss, int | float) else None
