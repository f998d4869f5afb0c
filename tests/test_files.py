"""Laws of files: pixels and pictures hold what they should, and nothing is half written."""

import json

import numpy as np
import pytest
from PIL import Image
from reference import refused

from diffusion import files
from diffusion.images import sheet, to_uint8, write_png


def test_pixels_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 40, channels)).astype(np.uint8)
    write_png(tmp_path / "grid.png", sheet(images, min_height=0))
    canvas = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 41 + 1, 3 * 41 + 1, channels)
    for i, image in enumerate(images):
        top, left = i // 3 * 41 + 1, i % 3 * 41 + 1
        np.testing.assert_array_equal(canvas[top : top + 40, left : left + 40], image)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        files.write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), 2)}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None],
        "b": {"c": [None, 2]},
    }


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    folder = tmp_path / "a"
    with files.locked(folder, "training in"):
        with refused("another process is training in .*a;"), files.locked(folder, "training in"):
            pass
        with files.locked(folder, "measuring into", ".other"):
            pass
    with files.locked(folder, "training in"):
        pass


def test_a_digest_is_of_names_types_shapes_and_values():
    params = {"a": {"b": np.arange(6.0)}, "c": np.zeros(2, np.float32)}
    assert files.digest(params) == files.digest({"c": params["c"].copy(), "a": {"b": np.arange(6.0)}})
    others = [{"a": {"x": np.arange(6.0)}}, {"a": {"b": np.arange(6.0).reshape(2, 3)}}, {"c": np.zeros(2)}]
    others += [{"a": {"b": np.arange(6.0) + 1e-9}}]
    assert len({files.digest({**params, **other}) for other in [{}, *others]}) == 5
