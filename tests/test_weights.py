"""Laws of weights files: what goes in comes out, and what is damaged is refused."""

import json
import random

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import assert_same

from configs import digits
from diffusion.errors import InputError
from diffusion.model import Trained, make_model
from diffusion.pretrained import weights


@pytest.fixture(scope="module")
def trained():
    config = digits.get_config()
    with config.unlocked():
        config.model.update(width=8, multipliers=(1,), num_blocks=1, attention_resolutions=())
    model = make_model(config, (8, 8, 1))
    return Trained(model, model.init(jax.random.key(0)), config, 7, "0.995")


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(path, trained, {"frechet": 0.5})
    return path


def test_weights_config_and_figures_come_back(trained, file):
    loaded = weights.load(file)
    assert_same(loaded.params, trained.params)
    assert (loaded.step, loaded.ema) == (7, "0.995")
    assert json.dumps(loaded.config.to_dict()) == json.dumps(trained.config.to_dict())
    assert loaded.model.image_shape == (8, 8, 1)
    assert weights.describe(file)["figures"] == {"frechet": 0.5}
    x, t = np.ones((2, 8, 8, 1), np.float32), np.array([3.0, 900.0])
    np.testing.assert_array_equal(
        loaded.model.apply_fn(loaded.params, x, t, None), trained.model.apply_fn(trained.params, x, t, None)
    )


def test_the_same_model_gives_the_same_file(trained, file, tmp_path):
    weights.save(tmp_path / "again.safetensors", trained, {"frechet": 0.5})
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_flipped_bit_of_the_weights_is_found(file):
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")  # behind the header
    rng = random.Random(0)
    for _ in range(20):
        place = rng.randrange(begin, len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            weights.load(file)


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_a_truncated_file_is_refused(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match="cannot be read"):
        weights.load(file)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}, {"model": "{}"}):
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, metadata))
        with pytest.raises(InputError, match=r"no file of convert\.py"):
            weights.load(path)
    with pytest.raises(InputError, match="there is no file"):
        weights.load(tmp_path / "nothing.safetensors")


def test_weights_that_do_not_fit_their_config_are_refused(trained, file):
    trained.config.model.width = 16
    try:
        weights.save(file, trained)
    finally:
        trained.config.model.width = 8
    with pytest.raises(InputError, match="another network"):
        weights.load(file)
