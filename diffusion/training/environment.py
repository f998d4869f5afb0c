"""Records where a run was trained: versions, commit, machine."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion import __version__, devices
from diffusion.files import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


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


def append(path: Path, start: dict[str, Any]) -> None:
    """Adds a start to the list in a JSON file; a file that holds no list is replaced by a new one."""
    try:
        starts = json.loads(path.read_text())
    except (OSError, ValueError):
        starts = []
    starts = starts if isinstance(starts, list) else []
    write_json(path, [*starts, start])


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
