"""Laws of the measures and of the files that hold pictures."""

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from diffusion import data, files
from diffusion.errors import InputError
from diffusion.evaluation import digits
from diffusion.evaluation.frechet import frechet_distance


def test_frechet_distance_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1
    b = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    cross = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_shift_is_its_square_and_of_a_set_to_itself_zero():
    a = np.random.default_rng(0).normal(size=(50, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + np.array([3.0, 0, 4.0])) == pytest.approx(25)


def test_frechet_distance_takes_features_that_never_vary():
    a = np.random.default_rng(0).normal(size=(50, 3)) * [1, 1, 0]
    assert frechet_distance(a, 2 * a) == pytest.approx(np.sum(np.var(a, axis=0, ddof=1)) + np.sum(a.mean(0) ** 2))


@pytest.mark.parametrize("bad", [np.zeros((5, 2)), np.zeros((1, 3)), np.zeros(3), np.full((5, 3), np.nan)])
def test_features_that_cannot_be_compared_are_refused(bad):
    with pytest.raises(InputError):
        frechet_distance(np.zeros((5, 3)), bad)


def test_real_digits_score_better_than_noise_with_their_pixel_statistics():
    real = data.load("digits")
    rng = np.random.default_rng(0)
    pixels = digits.pixels(real.images)
    fake = rng.multivariate_normal(pixels.mean(0), np.cov(pixels.T), 400)
    fake = files.to_uint8(2 * fake - 1).reshape(-1, 8, 8, 1)
    held_out, noise = digits.reference_scores(real), digits.score(fake, real)
    assert held_out.mean_top_probability > 0.85 > 0.7 > noise.mean_top_probability
    assert held_out.frechet < noise.frechet
    assert sum(noise.class_shares) == pytest.approx(1)
    assert len(noise.class_shares) == 10


def test_pixels_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(files.to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(files.to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 40, channels)).astype(np.uint8)
    files.write_png(tmp_path / "grid.png", files.grid(images, min_height=0))
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
