"""Checkpoints: all that touches orbax stands here.

One folder a step holds two items: `ema`, the weights that samples are drawn with, and `train`, the rest of the state.
The config travels in the checkpoint's metadata, so that both are committed by the same rename.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from diffusion.errors import InputError
from diffusion.training.step import TrainState
from diffusion.types import Params

_METADATA = "_CHECKPOINT_METADATA"  # written last by orbax; an interrupted or empty folder lacks it


class CheckpointWriter:
    """Saves the train state in the background and keeps the newest `keep`. Leaving the context waits for it."""

    def __init__(self, folder: str | os.PathLike, keep: int):
        self._folder = Path(folder).absolute()
        complete = steps(folder)
        for path in self._folder.glob("*"):
            if path.name.isdigit() and int(path.name) not in complete:
                raise InputError(f"{path} is no complete checkpoint; delete it and start again with the same command")
        self._pending = None
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Starts to save; an error of the save before is raised here. Saving a step again does nothing.

        Args:
          step: number of updates made.
          state: may be donated as soon as this returns.
          metadata: what JSON can hold.

        Raises:
          InputError: the disk is full or cannot be written; checkpoints already there are whole.
        """
        self.wait()
        if step in steps(self._folder):
            return
        items = {"ema": state.ema_params, "train": state.replace(ema_params=None)}
        plain = json.loads(json.dumps(metadata))
        try:
            self._pending = self._checkpointer.save_checkpointables_async(
                step, items, force=True, custom_metadata=plain
            )
        except (OSError, ValueError) as error:
            self._fail(error)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, ValueError) as error:
            self._fail(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            # After a failed save, close raises that error once more.
            with contextlib.suppress(OSError, ValueError):
                self._checkpointer.close()

    def _fail(self, error):
        saved = steps(self._folder)
        left = f"step {saved[-1]} is the last good one" if saved else "there is no earlier one"
        raise InputError(
            f"a checkpoint could not be written to {self._folder} ({_first_line(error)}); {left}; "
            "free some space and start again with the same command"
        ) from error


def newest_commit(folder: str | os.PathLike) -> float:
    """When the newest complete checkpoint was written, in seconds since the epoch; -inf if there is none."""
    saved = steps(folder)
    return (Path(folder) / str(saved[-1]) / _METADATA).stat().st_mtime if saved else -math.inf


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps of all complete checkpoints in a folder, ascending."""
    return sorted(int(path.parent.name) for path in Path(folder).glob(f"*/{_METADATA}") if path.parent.name.isdigit())


def metadata(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """What was given to `save` as metadata.

    Raises:
      InputError: there is no readable checkpoint of this step.
    """
    path = Path(folder).absolute() / str(step)
    try:
        saved = ocp.checkpointables_metadata(path).custom_metadata
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({_first_line(error)}); delete this folder") from error
    if not saved:
        raise InputError(f"checkpoint {path} cannot be read (no metadata); delete this folder")
    return saved


def load_ema(folder: str | os.PathLike, step: int, like: Params) -> Params:
    """The EMA weights of a step.

    Args:
      folder: the folder of all steps.
      step: one of `steps(folder)`.
      like: tree of arrays or ShapeDtypeStructs with shardings.

    Raises:
      InputError: the checkpoint is of another model (the first differing fields are named) or damaged.
    """
    return _load(folder, step, {"ema": like})["ema"]


def load_state(folder: str | os.PathLike, step: int, like: TrainState) -> TrainState:
    """The whole state of a step, laid out as `like`; raises as `load_ema`."""
    items = _load(folder, step, {"ema": like.ema_params, "train": like.replace(ema_params=None)})
    return items["train"].replace(ema_params=items["ema"])


def _load(folder, step, items):
    path = Path(folder).absolute() / str(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    remedy = "it is damaged; delete it to use the one before"
    try:
        stored = (ocp.checkpointables_metadata(path).metadata or {}).get("ema")
        if not stored:
            raise InputError(f"checkpoint {path} has no readable list of its weights; {remedy}")
        _check_same(path, _leaves(stored), _leaves(abstract["ema"]))
        return ocp.load_checkpointables(path, abstract)
    except InputError:
        raise
    except Exception as error:  # orbax raises errors of many kinds for a damaged file, tensorstore's own among them
        raise InputError(
            f"checkpoint {path} cannot be loaded ({_first_line(error.__cause__ or error)}); {remedy}"
        ) from error


def _leaves(tree):
    """{"a/b": "float32 (3, 3)"} of any tree whose leaves have shape and dtype."""
    named = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype} {x.shape}" for path, x in named}


def _check_same(path, stored, wanted):
    different = [
        f"{name}: checkpoint has {stored.get(name, 'nothing')}, model has {wanted.get(name, 'nothing')}"
        for name in sorted(stored | wanted)
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise InputError(f"checkpoint {path} is of another model: {'; '.join(different[:5])}{more}")


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
