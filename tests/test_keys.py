"""Laws of the random generator and of precision: neither depends on JAX's settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import devices, editing, keys, pretrained, schedules, solvers, timesteps
from diffusion.commands.drawing import generate
from diffusion.evaluation import bound
from diffusion.training import run_folder

SCHEDULE = schedules.cosine()
TABLE = solvers.ddim(SCHEDULE, timesteps.uniform(SCHEDULE, 4), eta=1.0)
ROOT = Path(__file__).parent.parent

DIGEST = """
import jax, numpy as np
from diffusion import devices, pretrained, solvers, timesteps
from diffusion.commands.drawing import generate
from diffusion.sealed import digest
from diffusion.models import UNet
trained = pretrained.load("digits")
model = trained.model
table = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 3), eta=1.0)
mesh = devices.data_mesh()
images = [
    np.concatenate(list(generate(model, trained.params, table, range(6), seed=3, mesh=mesh, clip="none", batch_size=b)))
    for b in (2, 6)
]
print("batches differ by", int(np.abs(np.subtract(*images, dtype=int)).max()))
print("images", digest({"images": images[0]}))
print("parameters", digest(jax.device_get(model.init(jax.random.key(5)))))
"""


def network(params, x, t, cond=None):
    return jnp.tanh(x)


def draw(key, ids=(0, 1, 2)):
    return diffusion.sample(network, {}, TABLE, key, len(ids), (5,), sample_ids=jnp.array(ids), prediction="x0")


def words(**settings):
    """What a process with these environment variables prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"} | settings
    result = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True)
    return result.stdout


def test_images_and_parameters_do_not_depend_on_the_ambient_generator_or_precision():
    wanted = words()
    assert "batches differ by 0" in wanted or "batches differ by 1" in wanted
    others = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "false", "JAX_ENABLE_X64": "true"}
    assert words(**others) == wanted


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_draws_as_the_threefry_key_of_its_seed(implementation):
    other = jax.random.key(7, impl=implementation)
    np.testing.assert_array_equal(draw(other), draw(jax.random.key(7, impl="threefry2x32")))
    alone = draw(jax.random.fold_in(other, 3), ids=(2,))
    np.testing.assert_allclose(alone[0], draw(jax.random.fold_in(other, 3))[2], atol=1e-6)
    np.testing.assert_array_equal(jax.jit(draw)(other), jax.jit(draw)(keys.make(7)))


def test_bare_words_are_a_key_and_nothing_else_is():
    np.testing.assert_array_equal(draw(jax.random.PRNGKey(7)), draw(keys.make(7)))
    for wrong in (0, None, "0", np.arange(3), jax.random.split(keys.make(0), 3), np.zeros(2)):
        with refused("key is"):
            draw(wrong)


def test_everything_drawn_is_the_same_in_the_older_form_of_threefry():
    def everything():
        images = jnp.zeros((3, 4))
        params = pretrained.load("digits").model.init(keys.make(1))
        noised = editing.noised(SCHEDULE, images, 500, keys.make(2))
        tau = timesteps.uniform(SCHEDULE, 3)
        bits = bound.variational_bound(network, {}, SCHEDULE, tau, images - 1, keys.make(3), prediction="x0")
        return jax.device_get((draw(keys.make(0)), params, noised, bits))

    jax.clear_caches()
    wanted = everything()
    jax.clear_caches()
    with jax.threefry_partitionable(False):
        jax.tree.map(np.testing.assert_array_equal, everything(), wanted)


def test_a_program_draws_the_same_images_in_double_precision():
    trained = pretrained.load("digits")
    model, table = (
        trained.model,
        solvers.ddim(trained.model.schedule, timesteps.uniform(trained.model.schedule, 3), 1.0),
    )

    def images():
        mesh = devices.data_mesh(2)
        return np.concatenate(list(generate(model, trained.params, table, range(4), seed=1, mesh=mesh, batch_size=4)))

    wanted = images()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(images(), wanted)


def test_a_run_of_another_generator_does_not_go_on(tmp_path):
    folder = run_folder.RunFolder(tmp_path)
    saved, wanted = {"config": {}}, {"config": {}, "generator": keys.GENERATOR}
    defaults = {"config": {}, "generator": keys.GENERATOR}
    run_folder.check_resumable(saved, wanted, folder, defaults)  # as all runs before this was recorded
    with refused(re.escape(keys.GENERATOR)):
        run_folder.check_resumable({**saved, "generator": "rbg"}, wanted, folder, defaults)
