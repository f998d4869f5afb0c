"""Finds, checks and reads checkpoints, which `saving` writes.

Each step has a folder with one item for each EMA, the params that samples are drawn with, and `train`, the rest of the
state. The config travels in the checkpoint's metadata. Every folder with a number was complete once, and its SHA-256
manifest finds any later change.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from diffusion import files
from diffusion.errors import InputError, printable
from diffusion.training import manifest
from diffusion.training.state import TrainState
from diffusion.types import Params

REASONS = (OSError, ValueError, KeyError)
"""What orbax raises where a checkpoint cannot be written or read."""

_PATTERNS = re.compile(r"[][*?\\]|:(/|$)")
"""What orbax or tensorstore take for a pattern, a separator or a place on the network, in whatever folder it stands."""


_TEACHER = "teacher"


def steps(folder: str | os.PathLike) -> list[int]:
    """Returns the steps of all checkpoints in a folder, ascending; `newest_good` finds out which are whole."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if _is_step(path))


def _is_step(path):
    written = re.fullmatch(r"0|[1-9]\d{0,18}", path.name, flags=re.ASCII)
    return written is not None and path.is_dir() and not path.is_symlink()


def require_plain_path(folder: str | os.PathLike) -> None:
    """Raises InputError if checkpoints that are saved in a folder could not be loaded, for a sign in its path."""
    path = str(Path(folder).absolute())
    if found := _PATTERNS.search(path):
        raise InputError(
            f"the path {path} holds {found[0]!r}, and checkpoints could not be read there: name a folder whose whole "
            "path has no brackets, stars, question marks and backslashes, and no name that ends with a colon"
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"the path {path!a} is no UTF-8, and checkpoints could not be read there") from None


def newest_commit(folder: str | os.PathLike) -> float:
    """Returns when the newest checkpoint was written, in seconds since 1970; -inf if there is none."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(FileNotFoundError):  # a run has removed it just now
            return (Path(folder) / str(step)).stat().st_mtime
    return -math.inf


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
        raise DamagedError(f"checkpoint {path} is damaged ({first_line(error)})") from error
    except OSError as error:  # no damage: a network file system may be away for a moment
        raise InputError(f"checkpoint {path} cannot be read now ({error.strerror}); start again when it can") from error
    return step


def newest_good(folder: str | os.PathLike) -> int | None:
    """Returns what `opened` yields, for the one process that removes checkpoints itself."""
    with opened(folder) as step:
        return step


@contextlib.contextmanager
def opened(folder: str | os.PathLike, step: int | None = None) -> Iterator[int | None]:
    """Finds a checkpoint whose files are all as they were written, and keeps it from being removed in the `with` block.

    Without this, a run that saves several times a second would remove each step before it is read. Damaged ones are
    named on stderr.

    Args:
      folder: where the folders of all steps lie.
      step: one of `steps(folder)`; None is the newest good one.

    Yields:
      The step, or None if there is no checkpoint.

    Raises:
      DamagedError: the step asked for is damaged.
      InputError: it is not there; or there are checkpoints, and all are damaged; or one cannot be read now, which is no
        damage.
    """
    if step is not None:
        with files.in_use(Path(folder) / str(step) / manifest.NAME):
            yield verified(folder, step)
        return
    # Newest first, to read no more than is needed; damaged ones are named once it is known what replaces them.
    damage: dict[int, str] = {}
    while left := [step for step in steps(folder) if step not in damage]:
        path = Path(folder) / str(left[-1])
        with files.in_use(path / manifest.NAME):
            try:
                verified(folder, left[-1])
            except DamagedError as error:
                if path.is_dir():
                    damage[left[-1]] = str(error.__cause__)
                continue
            except InputError:
                if not path.is_dir():  # a run has removed it since it was listed, so a newer one is there
                    continue
                raise
            for bad, reason in damage.items():
                warning = f"warning: checkpoint {Path(folder) / str(bad)} is damaged ({reason}); using step {left[-1]}"
                print(printable(warning), file=sys.stderr)
            yield left[-1]
            return
    # All are damaged, and the user must decide: a copy may exist elsewhere, and training anew may cost days.
    if damage:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damage.items())
        raise InputError(f"every checkpoint in {folder} is damaged ({reasons}); restore one or name another --workdir")
    yield None


def sealed_record(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns what was known of the run's record when a step was saved: file names with their bytes and SHA-256."""
    record = manifest.read(Path(folder) / str(step)).get("record")
    return record if isinstance(record, dict) else {}


def metadata(folder: str | os.PathLike, step: int) -> dict[str, Any]:
    """Returns the metadata that was given to `save`.

    Raises:
      InputError: there is no readable checkpoint of this step.
    """
    require_plain_path(folder)
    path = Path(folder).absolute() / str(step)
    try:
        if odd := manifest.odd_names(path):  # orbax would wait for what a pipe says
            raise ValueError(f"{odd[0]} is no regular file")
        saved = ocp.checkpointables_metadata(path).custom_metadata
    except (*REASONS, TypeError, AttributeError, RecursionError) as error:  # what a stranger made up
        raise InputError(f"checkpoint {path} cannot be read ({first_line(error)}); delete this folder") from error
    if not isinstance(saved, dict) or "config" not in saved:
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
    items = _load(folder, step, items_of(like))
    ema_params = {name: items[_ema_item(name)] for name in like.ema_params}
    return TrainState(**{**items["train"], "ema_params": ema_params, "teacher": items.get(_TEACHER)})


def items_of(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are stored, and can be loaded, by themselves."""
    parts = {_ema_item(name): params for name, params in state.ema_params.items()}
    if state.teacher is not None:
        parts[_TEACHER] = state.teacher
    # The fields by name, without the teacher: checkpoints from before there was one are laid out so.
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del rest["teacher"]
    return parts | {"train": rest | {"ema_params": None}}


def _ema_item(name):
    return f"ema_{name}"


def _load(folder, step, items):
    require_plain_path(folder)
    path = Path(folder).absolute() / str(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    try:
        stored = ocp.checkpointables_metadata(path).metadata or {}
        for name in abstract:
            _check_same(path, leaves(stored.get(name)), leaves(abstract[name]))
        return ocp.load_checkpointables(path, abstract)
    except InputError:
        raise
    except Exception as error:  # orbax raises many kinds of errors, some of them tensorstore's
        raise InputError(
            f"checkpoint {path} cannot be loaded ({first_line(error.__cause__ or error)}); its files are as they were "
            "written, so look for too little memory, or another version of a package, see environment.json"
        ) from error


def leaves(tree: Any) -> dict[str, str]:
    """Describes a tree by its leaves that have a shape and dtype, as {"a/b": "float32 (3, 3)"}."""
    named = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in named}
    return {name: f"{x.dtype} {tuple(x.shape)}" for name, x in leaves.items() if hasattr(x, "shape")}


def _check_same(path, stored, wanted):
    """Raises InputError, with the first five differences, if two results of `leaves` differ."""
    different = [
        f"{name}: checkpoint has {stored.get(name, 'nothing')}, model has {wanted.get(name, 'nothing')}"
        for name in sorted(stored | wanted)
        if stored.get(name) != wanted.get(name)
    ]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise InputError(f"checkpoint {path} is of another model: {'; '.join(different[:5])}{more}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
