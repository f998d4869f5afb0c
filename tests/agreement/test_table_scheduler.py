"""Our tables inside diffusers' own pipelines draw what our scan draws."""

import dataclasses
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import pretrained, schedules, solvers, timesteps
from diffusion.sampling import sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("torchvision"),
]

SHAPE, COUNT, STEPS = (8, 8, 1), 3, 5
LINEAR = schedules.linear()
START = 0.8
"""Below T, where float32 would divide the rounding errors of eps by next to no signal."""
TAU = timesteps.uniform(LINEAR, STEPS, START)


def learned(table, seed=0):
    """A table whose numbers, times included, no solver has made."""
    rng = np.random.default_rng(seed)
    update = table.update + 0.05 * rng.standard_normal(table.update.shape)
    return dataclasses.replace(table, update=update, t=table.t - 0.37, name="learned")


TABLES = {
    "ddim": solvers.ddim(LINEAR, TAU),
    "ddim of eta 0.5": solvers.ddim(LINEAR, TAU, 0.5),
    "ddpm": solvers.ddpm(LINEAR, TAU, "large"),
    "dpm_solver_pp, exact": solvers.dpm_solver_pp(LINEAR, TAU, 3),
    "sde dpm_solver_pp": solvers.dpm_solver_pp(LINEAR, TAU, 2, sde_eta=0.7),
    "unipc": solvers.unipc(LINEAR, timesteps.log_snr(LINEAR, STEPS, start=START)),
    "heun": solvers.heun(LINEAR, timesteps.karras(LINEAR, STEPS, start=START)),
    "singlestep": solvers.dpm_solver_pp_singlestep(LINEAR, timesteps.log_snr(LINEAR, STEPS, start=START), 3),
    "plms": solvers.plms(LINEAR, TAU),
    "afs unipc": solvers.analytic_first(solvers.unipc(LINEAR, TAU)),
    "learned": learned(solvers.unipc(LINEAR, TAU, 2)),
    "learned for the digits": solvers.from_json((pretrained.tables("digits") / "5.json").read_text()),
}


def answer(xp, x, t):
    """Nearly the best eps for data of variance 1/4, and not linear in x; t counts from 1 and fits to x."""
    power = xp.exp(-(1e-4 * t + (0.02 - 1e-4) * t**2 / 2000))
    return xp.sqrt(1 - power) * (x / (1 - 0.75 * power) + 0.1 * xp.sqrt(power) * xp.sin(3 * x))


def here(params, x, t, cond=None, *, dropout_keys=None):
    return answer(jnp, x, t[:, None, None, None])


def network():
    """The same in the place of what a UNet2DModel computes; it counts timesteps from 0."""
    one = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    size, _, channels = SHAPE
    model = diffusers.UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, norm_num_groups=1, add_attention=False, **one
    )
    model.forward = lambda x, t: types.SimpleNamespace(sample=answer(torch, x, t.float() + 1))
    return model


def drawn_here(table, clip, prediction="eps"):
    drawn = sample(here, {}, table, jax.random.key(0), COUNT, SHAPE, clip=clip, prediction=prediction)
    return np.clip(drawn, -1, 1)


def noise_of_ours(stage, count=COUNT, shape=SHAPE):
    """What our scan draws for its start, stage 0, and after each call."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), stage) for i in range(count)]
    return np.stack([jax.random.normal(key, shape) for key in keys])


def drawn_there(scheduler, calls):
    """What DDPMPipeline draws with this scheduler and our noise."""
    stages = iter(range(calls + 1))

    def ours(shape, **_):
        stage = next(stages)
        # Other pipelines multiply the start by init_noise_sigma; this one takes it for 1.
        scale = 1 if stage else scheduler.init_noise_sigma
        return torch.from_numpy(scale * noise_of_ours(stage).transpose(0, 3, 1, 2))

    pipeline = diffusers.DDPMPipeline(network(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    after = "diffusion.interop.table_scheduler.randn_tensor"
    with mock.patch("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", ours), mock.patch(after, ours):
        images = pipeline(batch_size=COUNT, num_inference_steps=calls, output_type="np").images
    return 2 * images - 1  # theirs are brought to 0..1, and clipped


@pytest.mark.parametrize("clip", ["none", "recompute", "keep_eps"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_draws_the_same_inside_a_pipeline(name, clip):
    from diffusion.interop.table_scheduler import TableScheduler

    table = TABLES[name]
    wanted = drawn_here(table, clip)
    found = drawn_there(TableScheduler(table.to_json(), clip=clip), table.nfe)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.mean(np.abs(wanted) < 1) > 0.5  # or clipping would hide what differs


@pytest.mark.parametrize(("prediction", "kind"), [("v", "v_prediction"), ("x0", "sample"), ("flow", "flow_prediction")])
def test_every_kind_of_prediction_is_read_as_here(prediction, kind):
    from diffusion.interop.table_scheduler import TableScheduler

    table = TABLES["ddim"]
    wanted = drawn_here(table, "none", prediction)
    found = drawn_there(TableScheduler(table.to_json(), prediction_type=kind), table.nfe)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_scheduler_comes_back_from_its_folder_and_refuses_another_number_of_steps(tmp_path):
    from diffusion.interop.table_scheduler import TableScheduler

    scheduler = TableScheduler(TABLES["learned"].to_json(), clip="recompute")
    scheduler.save_pretrained(tmp_path)
    again = TableScheduler.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.update, TABLES["learned"].update)
    assert again.config.clip == "recompute"
    (tmp_path / "it.json").write_text(TABLES["learned"].to_json())
    np.testing.assert_array_equal(TableScheduler.from_file(tmp_path / "it.json").timesteps, scheduler.timesteps)
    with pytest.raises(ValueError, match="makes 5 network calls; give num_inference_steps=5"):
        again.set_timesteps(50)
