"""Laws of the estimates for Analytic-DPM that are kept in a file."""

import numpy as np
import pytest
from reference import refused
from tiny import MODEL, make_params

from diffusion import files, sealed
from diffusion.data import Dataset
from diffusion.learning import analytic
from diffusion.model import Trained

TAU = np.array([100.0, 50.0, 0.0])
DATA = Dataset(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8), None, ())


@pytest.fixture
def trained(monkeypatch):
    """A model whose estimate is its time, and what was estimated."""
    estimated = []

    def estimate(model, params, images, times, key, labels):
        estimated.append(list(times))
        return np.asarray(times) / 100

    monkeypatch.setattr(analytic, "estimate_gamma", estimate)
    return Trained(MODEL, make_params(), None, 5, "0.9"), estimated


def gamma(folder, trained, tau=TAU, weights="a", say=lambda text: None):
    return analytic.cached_gamma(folder, trained[0], weights, DATA, tau, say)


def test_a_time_is_estimated_once_for_each_model_and_said_by_the_caller(trained, tmp_path, capsys):
    said = []
    np.testing.assert_array_equal(gamma(tmp_path / "new", trained, say=said.append), [1.0, 0.5])
    gamma(tmp_path / "new", trained)
    gamma(tmp_path / "new", trained, tau=np.array([100.0, 25.0, 0.0]))
    gamma(tmp_path / "new", trained, weights="b")
    assert trained[1] == [[100.0, 50.0], [25.0], [100.0, 50.0]]
    assert len(said) == 1
    assert capsys.readouterr() == ("", "")


def test_what_another_process_found_in_the_meantime_stays(trained, tmp_path, monkeypatch):
    def estimate(model, params, images, times, key, labels):
        files.write_json(tmp_path / analytic.FILE, {"step 5, EMA 0.9, weights a": {"7.0": 0.25}, "other": {"1.0": 0.5}})
        return np.asarray(times) / 100

    monkeypatch.setattr(analytic, "estimate_gamma", estimate)
    gamma(tmp_path, trained)
    assert sealed.read(tmp_path / analytic.FILE) == {
        "step 5, EMA 0.9, weights a": {"7.0": 0.25, "100.0": 1.0, "50.0": 0.5},
        "other": {"1.0": 0.5},
    }


def test_a_folder_that_cannot_be_written_is_a_warning(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="is estimated again next time"):
        found = gamma(tmp_path / "file" / "folder", trained)
    np.testing.assert_array_equal(found, [1.0, 0.5])


def test_a_damaged_file_is_refused_before_the_estimate(trained, tmp_path):
    (tmp_path / analytic.FILE).write_text("[]")
    with refused("is damaged or cannot be read; delete it"):
        gamma(tmp_path, trained)
    assert trained[1] == []
