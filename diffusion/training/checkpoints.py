"""Writes and reads checkpoints; all that uses orbax stands here.

Each step has a folder with one item for each EMA, the params that samples are drawn with, and `train`, the rest of the
state. The config travels in the checkpoint's metadata. A save is written under another name, gets its SHA-256 manifest,
and then its number by one renaming. So every folder with a number was complete once, and any later change is found.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from diffusion.errors import InputError
from diffusion.training import manifest
from diffusion.training.step import TrainState
from diffusion.types import Params

_UNFINISHED, _DAMAGED = "unfinished-", "damaged-"
_REASONS = (OSError, ValueError, KeyError)


class CheckpointWriter:
    """Saves the train state in the background. Leaving the context waits for the last save.

    Args:
      folder: where the folders of all steps lie. Remains of saves that were cut short are removed from it.
      keep: how many of the newest steps stay; older ones are removed when a newer one is complete.
      keep_best: how many of the steps with the lowest loss stay as well.
      begin: the step that the run goes on from. Later ones, which are damaged (see `newest_good`), are renamed to
        damaged-<step>, so that they do not count as the newest. None renames none.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, keep_best: int = 0, begin: int | None = None):
        self._folder = Path(folder).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._pending: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path)
            for step in steps(self._folder):
                if begin is not None and step > begin:
                    aside = self._folder / f"{_DAMAGED}{step}"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(self._folder / str(step), aside)

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any], loss: float = math.nan) -> None:
        """Starts to save in the background, after the save before; raises the error of that save if it had one.

        Args:
          step: number of training steps made, more than in any save before.
          state: may be donated as soon as this returns.
          metadata: a mapping that JSON can hold.
          loss: what keep_best ranks steps by; one that is not finite is never the best.

        Raises:
          InputError: the disk is full or cannot be written; checkpoints that are already there stay whole.
        """
        self.wait()
        temporary = self._folder / f"{_UNFINISHED}{step}"
        try:
            saving = ocp.save_checkpointables_async(
                temporary, _items(state), custom_metadata=json.loads(json.dumps(metadata))
            )
        except _REASONS as error:
            self._fail(error)
        self._pending = self._thread.submit(self._finish, saving, temporary, step, loss)

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except _REASONS as error:
            self._fail(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, saving, temporary, step, loss):
        # Every process waits for its own part, and the first then completes the checkpoint.
        saving.result()
        if jax.process_index() > 0:
            return
        manifest.write(temporary, step=step, loss=loss if math.isfinite(loss) else None)
        _sync(temporary)
        os.rename(temporary, self._folder / str(step))
        _sync_one(self._folder)
        self._remove_old()

    def _remove_old(self):
        saved = steps(self._folder)
        best = sorted((loss, step) for step in saved if (loss := _loss(self._folder, step)) is not None)
        kept = {*saved[-self._keep :], *(step for _, step in best[: self._keep_best])}
        for step in saved:
            if step not in kept:
                # Renamed first, so that a kill in the middle of removing leaves no half of a checkpoint.
                removed = self._folder / f"{_UNFINISHED}removal-{step}"
                os.rename(self._folder / str(step), removed)
                shutil.rmtree(removed)

    def _fail(self, error):
        saved = steps(self._folder)
        left = f"step {saved[-1]} is the last good one" if saved else "there is no earlier one"
        raise InputError(
            f"a checkpoint could not be written to {self._folder} ({_first_line(error)}); {left}; "
            "free some space and start again with the same command"
        ) from error


def steps(folder: str | os.PathLike) -> list[int]:
    """Returns the steps of all checkpoints in a folder, ascending; `newest_good` finds out which are whole."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if _is_step(path))


def _is_step(path):
    return path.name.isdecimal() and str(int(path.name)) == path.name and path.is_dir()


def newest_commit(folder: str | os.PathLike) -> float:
    """Returns when the newest checkpoint was written, in seconds since 1970; -inf if there is none."""
    saved = steps(folder)
    return (Path(folder) / str(saved[-1])).stat().st_mtime if saved else -math.inf


class DamagedError(InputError):
    """Reports a checkpoint that is not what was written."""


def verified(folder: str | os.PathLike, step: int) -> int:
    """Returns the step if its files are all as they were written.

    Raises:
      DamagedError: they are not.
      InputError: there is no such checkpoint, or it cannot be read now.
    """
    path = Path(folder) / str(step)
    if not path.is_dir():
        known = ", ".join(map(str, steps(folder))) or "none"
        raise InputError(f"{folder} has no checkpoint of step {step}; there are: {known}")
    try:
        manifest.verify(path)
    except (ValueError, FileNotFoundError) as error:
        raise DamagedError(f"checkpoint {path} is damaged ({_first_line(error)})") from error
    except OSError as error:  # no damage: a network file system may be away for a moment
        raise InputError(f"checkpoint {path} cannot be read now ({error.strerror}); start again when it can") from error
    return step


def newest_good(folder: str | os.PathLike) -> int | None:
    """Returns the newest step whose files are all as they were written, or None if there is no checkpoint.

    Each damaged one is named on stderr.

    Raises:
      InputError: there are checkpoints, and all are damaged; or one cannot be read now, which is no damage.
    """
    # Newest first, to read no more than is needed; damaged ones are named once it is known what replaces them.
    damage = {}
    for step in reversed(steps(folder)):
        try:
            verified(folder, step)
        except DamagedError as error:
            damage[step] = str(error.__cause__)
            continue
        for bad, reason in damage.items():
            print(
                f"warning: checkpoint {Path(folder) / str(bad)} is damaged ({reason}); using step {step}",
                file=sys.stderr,
            )
        return step

    # All are damaged, and the user must decide: a copy may exist elsewhere, and training anew may cost days.
    if not damage:
        return None
    reasons = "; ".join(f"{step}: {reason}" for step, reason in damage.items())
    raise InputError(f"every checkpoint in {folder} is damaged ({reasons}); restore one or name another --workdir")


def metadata(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns the metadata that was given to `save`.

    Raises:
      InputError: there is no readable checkpoint of this step.
    """
    path = Path(folder).absolute() / str(step)
    try:
        saved = ocp.checkpointables_metadata(path).custom_metadata
    except _REASONS as error:
        raise InputError(f"checkpoint {path} cannot be read ({_first_line(error)}); delete this folder") from error
    if not saved or "config" not in saved:
        raise InputError(f"checkpoint {path} cannot be read (it has no config); delete this folder")
    return saved


def load_ema(folder: str | os.PathLike, step: int, name: str, like: Params) -> Params:
    """Loads one EMA of a step.

    Args:
      folder: where the folders of all steps lie.
      step: one of `steps(folder)`.
      name: a key of TrainState.ema_params.
      like: a tree of arrays or ShapeDtypeStructs with the shapes and shardings wanted.

    Raises:
      InputError: the checkpoint is of another model (the first differing fields are named), or cannot be loaded.
    """
    return _load(folder, step, {_ema_item(name): like})[_ema_item(name)]


def load_state(folder: str | os.PathLike, step: int, like: TrainState) -> TrainState:
    """Loads the whole state of a step, laid out over devices like the arrays of `like`; raises as `load_ema` does."""
    items = _load(folder, step, _items(like))
    return items["train"].replace(ema_params={name: items[_ema_item(name)] for name in like.ema_params})


def _items(state):
    """Returns the parts of a state that are stored, and can be loaded, by themselves."""
    return {_ema_item(name): params for name, params in state.ema_params.items()} | {
        "train": state.replace(ema_params=None)
    }


def _ema_item(name):
    return f"ema_{name}"


def _load(folder, step, items):
    path = Path(folder).absolute() / str(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    try:
        stored = ocp.checkpointables_metadata(path).metadata or {}
        for name in abstract:
            _check_same(path, _leaves(stored.get(name)), _leaves(abstract[name]))
        return ocp.load_checkpointables(path, abstract)
    except InputError:
        raise
    except Exception as error:  # orbax raises many kinds of errors, some of them tensorstore's
        raise InputError(
            f"checkpoint {path} cannot be loaded ({_first_line(error.__cause__ or error)}); its files are as they were "
            "written, so look for too little memory, or another version of a package, see environment.json"
        ) from error


def _leaves(tree):
    """Describes a tree by its leaves that have a shape and dtype, as {"a/b": "float32 (3, 3)"}."""
    named = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in named}
    return {name: f"{x.dtype} {tuple(x.shape)}" for name, x in leaves.items() if hasattr(x, "shape")}


def _check_same(path, stored, wanted):
    """Raises InputError, with the first five differences, if two results of `_leaves` differ."""
    different = [
        f"{name}: checkpoint has {stored.get(name, 'nothing')}, model has {wanted.get(name, 'nothing')}"
        for name in sorted(stored | wanted)
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise InputError(f"checkpoint {path} is of another model: {'; '.join(different[:5])}{more}")


def _loss(folder, step):
    """Returns the loss that was saved with a step, or None if there is none or it cannot be read."""
    try:
        return manifest.read(folder / str(step))["loss"]
    except _REASONS:
        return None


def _sync(folder):
    """Puts all of a folder on disk before it gets its number, in case the machine loses power."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
