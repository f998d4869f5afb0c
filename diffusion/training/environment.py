"""Records where a run was trained: versions, commit, machine."""

import importlib.metadata
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion import __version__, devices, files
from diffusion.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions on which figures and samples depend, for their records."""
    return {"diffusion": __version__, "jax": jax.__version__, "numpy": np.__version__}


def describe(mesh: Mesh, step: int) -> dict[str, Any]:
    """Describes this start of a run, which begins at `step`, by a dict that JSON can hold."""
    return {
        "step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "devices": devices.describe(mesh),
        "processes": jax.process_count(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "diffusion": __version__,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": _git(Path(__file__).parent),
    }


def append(path: Path, start: dict[str, Any], within: Path) -> None:
    """Adds a start to the list in a JSON file; a file that holds no list is kept under another name.

    Args:
      path: the file, which need not be there.
      start: from `describe`.
      within: the run folder, see `files`.
    """
    try:
        starts = files.read_json(path, within=within)
    except FileNotFoundError:
        starts = []
    except InputError as error:
        starts = str(error)
    if not isinstance(starts, list):
        aside = files.keep_aside(path, within)  # refuses a link
        warnings.warn(f"{path} holds no list of starts, and is kept as {aside.name}", stacklevel=2)
        starts = []
    files.write_json(path, [*starts, start], within)


def _git(folder: Path) -> dict[str, Any] | None:
    """Returns the commit of the code, and whether files were changed since; None outside a git clone."""

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
