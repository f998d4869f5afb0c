"""What the machine and the schedule cannot do is said in one line, before the work."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run, train
from ml_collections import ConfigDict
from reference import refused

from diffusion import devices, keys, schedules, solvers, timesteps
from diffusion.commands import starts
from diffusion.data import Dataset
from diffusion.learning.analytic import cached_gamma, estimate_gamma
from diffusion.model import Conditions, Model, Trained
from diffusion.spaces import pixels


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc", "JAX_NUM_CPU_DEVICES is 'abc'; give a whole number"),
        ("JAX_NUM_CPU_DEVICES", "0", "JAX_NUM_CPU_DEVICES is '0'"),
        ("JAX_PLATFORMS", "nonsense", "JAX_PLATFORMS is 'nonsense', and JAX finds no such device here"),
    ],
)
def test_a_variable_of_jax_that_names_no_device_is_refused_in_one_line(variable, value, says, tmp_path):
    result = run("sample.py", "--dry_run", cwd=tmp_path, env=os.environ | {variable: value})
    assert says in error_line(result)


def test_a_mesh_of_no_devices_or_parts_is_refused():
    for wrong in ({"fsdp": 0}, {"fsdp": -1}, {"microbatches": 0}):
        with refused("must be at least 1"):
            devices.training_mesh(4, **wrong)
    with refused("batch_size is 0"):
        devices.training_mesh(0)


def notes(schedule, tau, prediction="eps", clip="recompute"):
    return list(starts.start_notes(solvers.dpm_solver_pp(schedule, tau), schedule, prediction, clip))


def test_a_start_whose_errors_nothing_bounds_is_noted_for_eps_and_not_for_v():
    cosine, linear = schedules.cosine(), schedules.linear()
    tau = timesteps.uniform(cosine, 25)
    (note,) = notes(cosine, tau, clip="none")
    signal, noise = (np.sqrt(level[tau[:2]]) for level in (cosine.alpha_bar, cosine.noise_var))
    # One DDIM step: D is off by n / a times the error in eps, and weighs a_s - (n_s / n_t) a_t.
    gain = (signal[1] - noise[1] / noise[0] * signal[0]) * noise[0] / signal[0]
    assert gain > 100
    assert f"multiplies the network's errors by {gain:,.0f}, as the signal at t = 1000" in note
    for quiet in ({"prediction": "v", "clip": "none"}, {"prediction": "x0", "clip": "none"}, {}):
        assert notes(cosine, tau, **quiet) == []
    assert notes(linear, timesteps.uniform(linear, 25), clip="none") == []


def test_a_start_is_noted_where_it_holds_signal_and_only_there():
    for schedule in (schedules.linear(), schedules.cosine(), schedules.edm(), schedules.rectified_flow()):
        assert notes(schedule, timesteps.uniform(schedule, 5)) == []
    for schedule in (schedules.linear(100), schedules.scaled_linear(), schedules.linear(200)):
        share = schedule.alpha_bar[-1]
        assert share > 1e-3
        (note,) = notes(schedule, timesteps.uniform(schedule, 5))
        assert f"{share:.2g} of its power" in note
    cosine = schedules.cosine()
    (note,) = notes(cosine, timesteps.quadratic(cosine, 5))
    assert "tau starts at 801, below T = 1000" in note
    assert notes(cosine, timesteps.explicit(cosine, [999, 500])) == []  # next to nothing is left there


def test_the_programs_say_that_a_schedule_leaves_signal_at_its_end(compile_once, tmp_path):
    schedule = "--config.schedule=linear:num_timesteps=100"
    said = [train(tmp_path, schedule, "--config.train.num_steps=1", "--workdir=run")]
    said.append(run("sample.py", "--workdir=run", "--dry_run", cwd=tmp_path))
    said.append(run("evaluate.py", "--workdir=run", "--num=65", "--steps=1", cwd=tmp_path))
    for result in said:
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("note: tau starts at 100, where x holds signal, 0.36 of its power") == 1


def test_gamma_of_a_model_without_an_untrained_no_class_asks_for_each_images_own(tmp_path):
    """A network that answers by class shows what it was asked: gamma is the mean of the squares of its answers."""
    schedule = schedules.cosine(100)
    asked = np.array([0.1, 0.2, 30.0])  # 30 stands for what nobody trained

    def apply_fn(params, x, t, cond=None):
        return jnp.asarray(params)[cond][:, None, None, None] + 0 * x

    model = Model(apply_fn, schedule, pixels((2, 2, 1)), "eps", Conditions(("a", "b"), 2))
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 0, 0, 1])
    key = keys.make(0)
    wanted = (3 * 0.1**2 + 0.2**2) / 4
    gamma = estimate_gamma(model, asked.astype(np.float32), images, [50], key, batch_size=4, labels=labels)
    np.testing.assert_allclose(gamma, wanted, rtol=1e-4)
    tau = np.array([50, 0])
    for dropout, value in ((0.0, wanted), (0.1, 30.0**2)):
        config = ConfigDict({"train": {"label_dropout": dropout}})
        trained = Trained(model, asked.astype(np.float32), config, 1, "0.9")
        data = Dataset(images=images, labels=labels, class_names=("a", "b"))
        found = cached_gamma(tmp_path, trained, "w", data, tau)
        np.testing.assert_allclose(found, value, rtol=1e-4)
