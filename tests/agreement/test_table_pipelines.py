"""Our tables inside the pipelines of latents, DiT and Stable Diffusion, draw the latents that our scan draws."""

from unittest import mock

import jax
import numpy as np
import pytest
from test_diffusers_folders import TRANSFORMERS, coder, encoder, transformer
from test_table_scheduler import TABLES, noise_of_ours
from test_text_to_image import pipeline  # noqa: F401, a fixture

from diffusion import keys
from diffusion.interop import diffusers as interop
from diffusion.sampling import sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("torchvision"),
]

COUNT, SCALE = 2, 3.0


@pytest.fixture(scope="module")
def dit(tmp_path_factory, torchvision):
    """A tiny pipeline of DiT, and what of it is read here."""
    model = transformer(**TRANSFORMERS["of latents"], num_embeds_ada_norm=1000)
    model.proj_out_2.weight.data *= 0.1
    vae = coder("AutoencoderKL", encoder((8, 8)))
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(folder)
    return pipe, interop.load(folder)


@pytest.fixture(scope="module")
def stable(pipeline):  # noqa: F811
    """A tiny pipeline of Stable Diffusion, and what of it is read here."""
    pipe, folder = pipeline
    return pipe, interop.load(folder)


def scheduled(table, image_shape, start=1.0):
    """A scheduler of a table, and a function in the place of torch's noise: ours, first that of the start, scaled."""
    from diffusion.interop.table_scheduler import TableScheduler

    stages = iter(range(table.nfe + 1))

    def ours(shape, **_):
        stage = next(stages)
        z = torch.from_numpy(noise_of_ours(stage, COUNT, image_shape).transpose(0, 3, 1, 2).copy())
        z = z if stage else start * z
        return torch.cat([z] * (shape[0] // COUNT))  # a pipeline of DiT has every latent twice

    return TableScheduler(table.to_json()), ours


def drawn_here(trained, table, cond, null):
    shared = {"cond": cond, "null_cond": null, "guidance_scale": SCALE, "clip": "none"}
    shape = trained.model.image_shape
    with jax.default_matmul_precision("highest"):
        found = sample(trained.model.apply_fn, trained.params, table, keys.make(0), COUNT, shape, **shared)
    return np.asarray(found)


def assert_same(found, wanted):
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert np.std(wanted) > 0.1


AFTER = "diffusion.interop.table_scheduler.randn_tensor"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_draws_the_same_classes_inside_dit(name, dit):
    pipe, trained = dit
    table = TABLES[name]
    # The pipeline of DiT takes init_noise_sigma for 1.
    pipe.scheduler, ours = scheduled(table, trained.model.image_shape, start=float(table.start_std))
    seen = []
    hook = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", ours), mock.patch(AFTER, ours):
        pipe([7, 3], guidance_scale=SCALE, num_inference_steps=table.nfe, output_type="np")
    hook.remove()
    found = (seen[0] * pipe.vae.config.scaling_factor).numpy().transpose(0, 2, 3, 1)
    wanted = drawn_here(trained, table, np.array([7, 3]), trained.model.conditions.nulls(COUNT))
    assert_same(found, wanted)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_draws_the_same_prompts_inside_stable_diffusion(name, stable):
    pipe, trained = stable
    table, prompts, negative = TABLES[name], ["the cat", "a dog"], "the dog!"
    pipe.scheduler, ours = scheduled(table, trained.model.image_shape)
    place = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.randn_tensor"
    settings = {"guidance_scale": SCALE, "num_inference_steps": table.nfe, "output_type": "latent"}
    with mock.patch(place, ours), mock.patch(AFTER, ours):
        found = pipe(prompts, negative_prompt=[negative] * COUNT, **settings).images
    conditions = trained.model.conditions.replace(prompts, negative)
    wanted = drawn_here(trained, table, conditions.encode(prompts), conditions.nulls(COUNT))
    assert_same(found.numpy().transpose(0, 2, 3, 1), wanted)
