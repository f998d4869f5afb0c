"""The entry points as a user runs them: in a shell, on a tiny model."""

import csv
import hashlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[1]
TINY = (
    "--config.model.width=4",
    "--config.model.multipliers=1",
    "--config.model.num_blocks=1",
    "--config.model.attention_resolutions=0",
    "--config.train.batch_size=8",
    "--config.optimizer.decay=constant",
    "--config.sample.steps=2",
    "--config.sample.num=4",
)


def shared_cache(folder):
    """Environment variables for commands: most of their time is compilation, so it is shared, and hardly optimizes."""
    return {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(script, *args):
    return [sys.executable, str(ROOT / script), *args]


def run(script, *args, cwd, **kwargs):
    return subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True, timeout=600, **kwargs)


def train(cwd, *args, size=TINY, **kwargs):
    return run("train.py", *size, *args, cwd=cwd, **kwargs)


def start_training(cwd, *args, env=None, size=TINY, **kwargs):
    """A training process whose output, stderr included, is read from its stdout."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = None if env is None else {**os.environ, **env}
    return subprocess.Popen(command("train.py", *size, *args), cwd=cwd, env=env, **pipes, **kwargs)


def read_until(process, text):
    """The lines up to one that starts with the text, or to the end."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            break
    return lines


def error_line(result):
    """The one line of a user error."""
    lines = [line for line in result.stderr.splitlines() if not re.match(r"[IW]\d{4} ", line)]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def digest(folder, step):
    """SHA-256 of every array of a checkpoint, read as it is."""
    path = (folder / "checkpoints" / str(step)).absolute()  # orbax finds nothing in a relative one
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    items = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) if hasattr(x, "shape") else x,
        dict(ocp.checkpointables_metadata(path).metadata),
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    result = hashlib.sha256()
    for name, leaf in jax.tree_util.tree_flatten_with_path(ocp.load_checkpointables(path, items))[0]:
        name = jax.tree_util.keystr(name, simple=True, separator="/")
        array = np.asarray(leaf)
        result.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return result.hexdigest()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
