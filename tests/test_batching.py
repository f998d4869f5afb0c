"""Laws of --batch_size=auto: what fits the memory by the compiled program's own account."""

import functools
import re

import jax
import numpy as np
import pytest
from commands import run
from jax.sharding import Mesh
from tiny import MODEL, SCHEDULE, make_params

from diffusion import machine, solvers, timesteps
from diffusion.commands import batching, drawing
from diffusion.evaluation import load_samples

TABLE = solvers.ddim(SCHEDULE, timesteps.uniform(SCHEDULE, 3))


class Drawn:
    """A sampling of which only the memory is asked."""

    @staticmethod
    @functools.cache
    def memory(count):
        return drawing.working_memory(MODEL, make_params(), TABLE, count)


DRAWN = Drawn()


def size(text="auto", devices=1, most=10**6):
    return batching.size(text, DRAWN, Mesh(np.array(jax.devices()[:devices]), ("data",)), most)


def test_a_number_is_taken_as_it_is():
    assert size("7") == 7


@pytest.mark.parametrize("devices", [1, 4])
def test_the_batch_is_the_largest_power_of_two_that_fits_each_device(devices, monkeypatch):
    per_image = DRAWN.memory(batching.PROBE) / batching.PROBE
    assert per_image >= 3 * 8 * 8 * 4  # at least x, the output and D, in float32
    for images, wanted in ((1.5, 1), (2.5, 2), (11, 8), (100, 64)):
        room = per_image * images * devices / batching.CPU_SHARE
        monkeypatch.setattr(machine, "memory", lambda room=room: room)
        assert size(devices=devices) == wanted * devices
    assert size(devices=devices, most=5) == 5
    monkeypatch.setattr(machine, "memory", lambda: 2**60)
    assert size(devices=devices) == batching.MOST


def test_a_batch_for_which_there_is_no_memory_is_said(monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory", lambda: 100)
    assert size() == 1
    assert "more than there is for one image" in capsys.readouterr().out


def test_the_program_finds_the_size_and_draws_the_same_images(tmp_path, compile_once):
    for name in ("auto", "64"):
        args = ("--workdir=shipped", "--steps=5", "--num=8", f"--out={name}", f"--batch_size={name}")
        done = run("sample.py", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert bool(re.search(r"^batch_size: 8 images at a time .* MiB an image", done.stdout, re.M)) == (
            name == "auto"
        )
    auto, fixed = (load_samples(tmp_path / name).images.astype(int) for name in ("auto", "64"))
    assert np.abs(auto - fixed).max() <= 1
