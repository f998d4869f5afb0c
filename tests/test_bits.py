"""Rows of bits per dimension are on disk once they are measured, and are not measured again."""

import json
import math
from types import SimpleNamespace

import numpy as np

from diffusion.commands.bits import Rows
from diffusion.data import Dataset
from diffusion.evaluation.likelihood import FlowRow


def source(sha256="a" * 64):
    return SimpleNamespace(name="runs/x", trained=SimpleNamespace(step=3, ema="0.9"), sha256=sha256, seed=0)


IMAGES = Dataset(np.zeros((2, 4, 4, 1), np.uint8), None, ())


def measured(path, steps=5, error=0.1, images=IMAGES, split="", **options):
    """The row of so many steps, and whether it was measured now."""
    calls = []

    def measure():
        calls.append(steps)
        return FlowRow(steps, 2.5, error)

    return Rows(path, source(**options), images, {"split": split}).get({"steps": steps}, measure), bool(calls)


def test_a_row_is_measured_once_for_each_model_and_set_of_images(tmp_path):
    path = tmp_path / "run" / "likelihood.json"
    wanted = {"steps": 5, "bits": 2.5, "standard_error": 0.1}
    assert measured(path) == (wanted, True)
    assert json.loads(path.read_text())["rows"] == [wanted]
    assert measured(path) == (wanted, False)
    assert measured(path, steps=7)[1]
    assert [row["steps"] for row in json.loads(path.read_text())["rows"]] == [5, 7]
    others = [{"sha256": "b" * 64}, {"split": "test"}, {"images": IMAGES._replace(images=IMAGES.images + np.uint8(1))}]
    for other in others:
        assert measured(path, **other) == (wanted, True)
        assert measured(path, **other) == (wanted, False)


def test_a_file_that_is_not_what_was_written_is_measured_again(tmp_path):
    path = tmp_path / "likelihood.json"
    measured(path)
    content = path.read_text()
    for damaged in ("", "[]", "{}", content.replace("2.5", "2.4"), content[: len(content) // 2]):
        path.write_text(damaged)
        assert measured(path)[1], damaged
        assert json.loads(path.read_text())["rows"][0]["bits"] == 2.5


def test_an_error_that_one_image_does_not_have_comes_back_as_none(tmp_path):
    row, _ = measured(tmp_path / "likelihood.json", error=math.nan)
    again, new = measured(tmp_path / "likelihood.json")
    assert not new
    assert math.isnan(row["standard_error"])
    assert math.isnan(again["standard_error"])
