"""Laws of models: what surrounds a network, and configs that earlier versions have saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from reference import refused

from configs import default
from diffusion import schedules
from diffusion.model import make_model, make_schedule
from diffusion.records import current_config
from diffusion.spaces import pixels


def small(**fields):
    config = default.get_config()
    config.model.update({"width": 4, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": (), **fields})
    return config


def test_pixels_are_encoded_to_the_whole_range_and_decoded_to_themselves():
    space = pixels((16, 16, 1))
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = space.encode(images)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, np.float32)
    np.testing.assert_array_equal(space.decode(x), images)
    np.testing.assert_allclose(jax.jit(space.encode)(images), x, atol=1e-7)
    assert space.clip == "recompute"


def test_a_model_with_classes_has_a_condition_that_means_none_and_their_names():
    model = make_model(small(num_classes=2), (8, 8, 1), ("cat", "dog"))
    assert model.conditions.names == ("cat", "dog")
    np.testing.assert_array_equal(model.conditions.nulls(3), [2, 2, 2])
    params = model.init(jax.random.key(0))
    params["class"]["embedding"] = jax.random.normal(jax.random.key(1), params["class"]["embedding"].shape)
    x, t = jnp.ones((3, 8, 8, 1)), jnp.full(3, 5)
    none = model.apply_fn(params, x, t, None)
    np.testing.assert_array_equal(model.apply_fn(params, x, t, model.conditions.nulls(3)), none)
    assert make_model(small(num_classes=2), (8, 8, 1)).conditions.names == ("0", "1")
    assert make_model(small(), (8, 8, 1)).conditions is None


def test_a_schedule_is_named_with_its_options():
    for text, wanted in (
        ("linear", schedules.linear()),
        ("linear:beta_end=0.03,num_timesteps=500", schedules.linear(500, beta_end=0.03)),
        ("cosine:max_beta=0.99", schedules.cosine(max_beta=0.99)),
        ("shifted_cosine:image_size=256", schedules.shifted_cosine(image_size=256)),
        ("edm:sigma_max=20,rho=5", schedules.edm(sigma_max=20.0, rho=5.0)),
    ):
        np.testing.assert_array_equal(make_schedule(text).alpha_bar, wanted.alpha_bar)
        np.testing.assert_array_equal(make_schedule(text).noise_var, wanted.noise_var)
    with refused("config.schedule is 'cosin'; did you mean 'cosine'"):
        make_schedule("cosin")


OLD = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"offset": 0.008, "max_beta": 0.999},
    "shifted_cosine": {"image_size": 128, "base_size": 64},
    "edm": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
    "rectified_flow": {},
}
"""The sections of version 0.1, with their defaults."""


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("changed", [False, True])
def test_the_schedule_of_a_run_of_version_0_1_is_the_same_schedule(name, changed):
    fields = {key: value * (2 if changed else 1) for key, value in OLD[name].items() if key != "max_beta"}
    num = 500 if changed else 1000
    saved = {"schedule": {"name": name, "num_timesteps": num, **OLD, name: fields}, "sample": {"tau": "uniform"}}
    config = current_config(saved)
    np.testing.assert_array_equal(
        make_schedule(config.schedule).alpha_bar, schedules.SCHEDULES[name](num, **fields).alpha_bar
    )
    assert changed or config.schedule == name
    assert current_config(config.to_dict()) == config


def test_lists_of_timesteps_of_version_0_1_are_read():
    for old, new in (("explicit:900,5", "explicit:times=900,5"), ("sections:3,2", "sections:counts=3,2")):
        assert current_config({"sample": {"tau": old}}).sample.tau == new
        assert current_config({"sample": {"tau": new}}).sample.tau == new


def test_what_a_config_cannot_mean_is_refused():
    config = small()
    config.train.prediction = "noise"
    with refused("config.train.prediction is 'noise'; valid: edm, eps"):
        make_model(config, (8, 8, 1))
    with refused("out_channels is 5; samples have 1 channels and objective simple wants 1"):
        make_model(ConfigDict(small(out_channels=5)), (8, 8, 1))
