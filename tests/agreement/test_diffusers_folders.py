"""Folders that diffusers' save_pretrained writes are read here without it, and compute and draw the same."""

import json
import re
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from configs import default
from diffusion import keys
from diffusion.commands import samplers
from diffusion.errors import InputError
from diffusion.interop import diffusers as interop
from diffusion.interop.diffusers.schedulers import CLASSES, read_scheduler
from diffusion.model import Trained, make_model, make_schedule
from diffusion.pretrained import autoencoders, weights
from diffusion.sampling import sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("torchvision"),
]

DDPM, FLOW = {"_class_name": "DDPMScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}

CIFAR = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CONSISTENCY = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 16,
    "attn_norm_num_groups": 32,
    "num_class_embeds": 7,
}
SKIP = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 32),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
GREY = {"in_channels": 1, "out_channels": 1}
TINY = {**SMALL, **GREY, "block_out_channels": (8,), "add_attention": False}
TINY |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
CONFIGURATIONS = {
    "ddpm-cifar10": CIFAR,
    "ddpm-church": {**CIFAR, "down_block_types": ("DownBlock2D",) * 2, "layers_per_block": 1},
    "mnist": {**SMALL, **GREY, "sample_size": 28, "block_out_channels": (32, 64, 64), "norm_num_groups": 32}
    | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
    | {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    "not square": {**SMALL, "sample_size": (8, 12)},
    "consistency": CONSISTENCY,
    "early consistency": {**CONSISTENCY, "attn_norm_num_groups": None},
    "added time, resnet resampling": {**CONSISTENCY, "resnet_time_scale_shift": "default"},
    "ncsnpp": SKIP,
    "ncsnpp without fourier": {**SKIP, "time_embedding_type": "positional", "block_out_channels": (32, 32, 64)},
    "class numbers": {**SMALL, "class_embed_type": "timestep"},
    "class vectors": {**SMALL, **GREY, "class_embed_type": "identity", "time_embedding_dim": 12},
    "learned times": {**SMALL, "time_embedding_type": "learned", "num_train_timesteps": 1000},
    "no middle": {**SMALL, "mid_block_type": None, "act_fn": "gelu"},
    "middle without attention": {**SMALL, "add_attention": False, "act_fn": "mish", "center_input_sample": True},
    "variance and odd width": {**SMALL, "out_channels": 6, "block_out_channels": (17, 24), "norm_num_groups": 1},
}


def network(fields):
    """A UNet2DModel none of whose weights is at its start."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**fields).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.15)
        if "norm" in name and name.endswith("weight"):
            weight.data += 1
    return model


def told(model, batch):
    """Classes for a model that is told any, as it takes them."""
    kind, config = model.config.class_embed_type, model.config
    if kind == "timestep":
        return np.array([3.0, 700.0], np.float32)[:batch]
    if kind == "identity":
        return np.random.default_rng(2).standard_normal((batch, config.time_embedding_dim)).astype(np.float32)
    return np.arange(batch) if config.num_class_embeds else None


def images(model, batch=2):
    size = model.config.sample_size
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return np.random.default_rng(1).standard_normal((batch, *shape, model.config.in_channels)).astype(np.float32)


def theirs(model, x, t, cond):
    with torch.no_grad():
        labels = None if cond is None else torch.from_numpy(cond)
        out = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), labels).sample
    return out.numpy().transpose(0, 2, 3, 1)


def assert_equal_networks(model, trained):
    x, t, cond = images(model), np.array([2, 977]), told(model, 2)
    with jax.default_matmul_precision("highest"):
        ours = t if trained.model.prediction == "flow" else t + 1  # most of their timesteps count from 0
        found = jax.jit(trained.model.apply_fn)(trained.params, x, ours, cond)
    wanted = theirs(model, x, t, cond)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.std(wanted) > 1e-3


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_network_read_from_its_folder_computes_the_same(name, tmp_path):
    model = network(CONFIGURATIONS[name])
    model.save_pretrained(tmp_path)
    fourier = model.config.time_embedding_type == "fourier"  # of the log of a time, which then cannot be 0
    trained = interop.load(tmp_path, scheduler=FLOW if fourier else DDPM)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained.params)) == sum(w.numel() for w in model.parameters())
    assert_equal_networks(model, trained)


DETERMINISTIC = {
    "DDIM": ("DDIMScheduler", {}),
    "DDIM of Stable Diffusion": (
        "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "DDIM from no signal": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "DDIM of 100 timesteps that predicts x_0": (
        "DDIMScheduler",
        {"prediction_type": "sample", "num_train_timesteps": 100, "beta_end": 0.1},
    ),
    "PLMS of Stable Diffusion": (
        "PNDMScheduler",
        {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1},
    ),
    "PNDM": ("PNDMScheduler", {"set_alpha_to_one": True}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ of order 3": ("DPMSolverMultistepScheduler", {"solver_order": 3, "timestep_spacing": "leading"}),
    "DPM-Solver++ exact": (
        "DPMSolverMultistepScheduler",
        {"solver_type": "heun", "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    ),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC of order 3": (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "disable_corrector": [0, 1], "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
    "Euler between timesteps": ("EulerDiscreteScheduler", {}),
    "Euler of a beta distribution": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DDIM with thresholding": ("DDIMScheduler", {"thresholding": True, "clip_sample": False}),
    "DPM-Solver++ with thresholding": ("DPMSolverMultistepScheduler", {"thresholding": True}),
    "UniPC in the eps basis": ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "DPM-Solver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM-Solver++ that leaves noise": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    "singlestep": ("DPMSolverSinglestepScheduler", {}),
    "singlestep of order 3": ("DPMSolverSinglestepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "singlestep exact": ("DPMSolverSinglestepScheduler", {"solver_type": "heun"}),
    "LMS": ("LMSDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM-Solver++": ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}),
}


@pytest.fixture(scope="module")
def pipeline_parts(tmp_path_factory):
    """A tiny network with the folder that it is saved in."""
    model = network(TINY)
    model.conv_out.weight.data *= 0.05
    folder = tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder)
    return model, folder


def drawn_there(model, scheduler, steps, z):
    """Their sample, and what it starts from in our scale."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # without it a scheduler looks its place up by the timestep, which may repeat
    x = torch.from_numpy(z.transpose(0, 3, 1, 2).copy()) * scheduler.init_noise_sigma
    divided = "Discrete" in type(scheduler).__name__  # k-diffusion's kind keeps x / a
    begin = x / (1 + float(scheduler.sigmas[0]) ** 2) ** 0.5 if divided else x
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(model(seen, t).sample, t, x).prev_sample
    return x.numpy().transpose(0, 2, 3, 1), begin.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_sampler_of_a_folder_draws_the_same(name, pipeline_parts, tmp_path):
    """25 steps of the sampler, grid, clip and schedule that the folder's scheduler becomes here."""
    (kind, options), (model, folder) = DETERMINISTIC[name], pipeline_parts
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.save_pretrained(tmp_path)
    trained = interop.load(folder, scheduler=json.loads((tmp_path / "scheduler_config.json").read_text()))
    z = np.random.default_rng(3).standard_normal((2, 8, 8, 1)).astype(np.float32)
    wanted, begin = drawn_there(model, scheduler, 25, z)
    config = trained.config.sample
    table = samplers.make_table(trained.model.schedule, config.sampler, 25, config.tau)
    shared = {"prediction": trained.model.prediction, "clip": config.clip, "x_init": begin}
    found = sample(trained.model.apply_fn, trained.params, table, jax.random.key(0), 2, (8, 8, 1), **shared)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=max(1, np.abs(wanted).max()) / 255)


def test_every_scheduler_is_read_or_the_guide_says_why_not():
    page = (Path(__file__).parents[2] / "docs/interop.md").read_text()
    refused = set(re.findall(r"`(\w+Scheduler)`", page.partition("Schedulers that are refused")[2].partition("\n#")[0]))
    everyone = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert {name for name in everyone if not name.startswith("Flax")} == refused | CLASSES.keys()
    assert not refused & CLASSES.keys()
    for name in refused:
        with pytest.raises(InputError, match=f"{name} is not supported; supported: DDPMScheduler, "):
            read_scheduler("it", {"_class_name": name})


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_distilled_models_take_timesteps_of_their_training(kind, steps):
    theirs = getattr(diffusers, kind)()
    theirs.set_timesteps(steps)
    found = read_scheduler("it", {"_class_name": kind})
    tau = samplers.make_tau(make_schedule(found.schedule), found.tau, steps)
    np.testing.assert_array_equal(tau[:-1] - 1, theirs.timesteps)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_take_the_shifted_times(kind, shift):
    theirs = getattr(diffusers, kind)(shift=shift)
    theirs.set_timesteps(10)
    found = read_scheduler("it", {"_class_name": kind, "shift": shift})
    tau = samplers.make_tau(make_schedule(found.schedule), found.tau, 10)
    np.testing.assert_allclose(tau / 1000, np.unique(theirs.sigmas.numpy())[::-1], rtol=1e-6, atol=1e-9)


def test_every_kind_of_file_holds_the_same_weights(tmp_path):
    model = network({**SMALL, "num_class_embeds": 5})
    files = {"one": {}, "parts": {"max_shard_size": "40KB"}, "bin": {"safe_serialization": False}}
    files |= {"bin in parts": {"safe_serialization": False, "max_shard_size": "40KB"}}
    for name, options in files.items():
        model.save_pretrained(tmp_path / name, **options)
    assert len(list((tmp_path / "parts").iterdir())) > 4
    first, *others = (interop.load(tmp_path / name, scheduler=DDPM).params for name in files)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)
    model.half().save_pretrained(tmp_path / "half", variant="fp16")
    half = interop.load(tmp_path / "half", scheduler=DDPM).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)), half, first)


def test_a_pickle_that_wants_more_than_tensors_is_refused(tmp_path):
    network(TINY).save_pretrained(tmp_path, safe_serialization=False)
    file, made = tmp_path / "diffusion_pytorch_model.bin", tmp_path / "made"

    class Attack:
        def __reduce__(self):
            return made.touch, ()

    torch.save({"conv_in.weight": Attack()}, file)
    with pytest.raises(InputError, match="which is no tensor"):
        interop.load(tmp_path, scheduler=DDPM)
    assert not made.exists()


def test_a_model_made_here_computes_the_same_in_diffusers(tmp_path):
    """A UNet of ours, whose timesteps begin with 1, and its scheduler."""
    config = default.get_config()
    with config.unlocked():
        config.model.update(width=128, multipliers=(1, 1), num_blocks=1, attention_resolutions=(4,), num_classes=2)
        config.schedule = "cosine"
        config.train.prediction = "v"
    model = make_model(config, (8, 8, 3))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, keys.make(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    interop.save(Trained(model, params, config, 1, "0.9999"), tmp_path)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    unet = pipeline.unet.eval()
    assert sum(weight.numel() for weight in unet.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    x, t, cond = images(unet), np.array([1, 640]), np.array([1, 2])
    wanted = theirs(unet, x, t - 1, cond)
    np.testing.assert_allclose(
        jax.jit(model.apply_fn)(params, x, t, cond), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()
    )
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, model.schedule.alpha_bar[1:], rtol=1e-4)


def test_what_diffusers_wrote_comes_back_as_it_was(tmp_path):
    diffusers.DDPMPipeline(network(SMALL), diffusers.DDPMScheduler(variance_type="fixed_large")).save_pretrained(
        tmp_path / "theirs"
    )
    interop.save(interop.load(tmp_path / "theirs"), tmp_path / "ours")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    wanted = diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs")
    for name, weight in wanted.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], weight)

    def fields(part):
        return {name: value for name, value in part.config.items() if not name.startswith("_")}

    assert fields(again.unet) == fields(wanted.unet)
    assert fields(again.scheduler) == fields(wanted.scheduler)


def encoder(levels, **fields):
    """The arguments of an autoencoder with these levels."""
    return {
        "block_out_channels": levels,
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "norm_num_groups": 4,
        "sample_size": 16,
        **fields,
    }


AUTOENCODERS = {
    "as in Stable Diffusion": ("AutoencoderKL", encoder((8, 16, 16), layers_per_block=2)),
    "grey, of one level": ("AutoencoderKL", encoder((8,), **GREY, latent_channels=2, scaling_factor=1.0)),
    "shifted": ("AutoencoderKL", encoder((8, 8), scaling_factor=0.3611, shift_factor=0.1159)),
    "without quantising convolutions": (
        "AutoencoderKL",
        encoder((8, 12), use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    ),
    "a codebook": ("VQModel", encoder((8, 16), num_vq_embeddings=11, scaling_factor=1.0)),
    "a codebook of other channels": ("VQModel", encoder((8, 8, 8), num_vq_embeddings=16, vq_embed_dim=2)),
}


def coder(kind, fields):
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**fields).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.2)
        if "norm" in name and name.endswith("weight"):
            weight.data += 1
    return model


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_read_from_its_folder_computes_the_same(name, tmp_path):
    kind, fields = AUTOENCODERS[name]
    model = coder(kind, fields)
    model.save_pretrained(tmp_path)
    found = interop.load_autoencoder(tmp_path)
    params = found.params
    size, channels = fields["sample_size"], model.config.in_channels
    x = np.random.default_rng(0).uniform(-1, 1, (2, size, size, channels)).astype(np.float32)
    shift, scale = getattr(model.config, "shift_factor", None) or 0, model.config.scaling_factor
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        z = encoded.latents if kind == "VQModel" else encoded.latent_dist.mean
        decoded = model.decode(z).sample
    latents = (z.numpy().transpose(0, 2, 3, 1) - shift) * scale
    pairs = [(found.encode(params, x), latents), (found.decode(params, latents), decoded.numpy().transpose(0, 2, 3, 1))]
    for ours, wanted in pairs:
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    autoencoders.save(tmp_path / "it.safetensors", found)
    jax.tree.map(np.testing.assert_array_equal, autoencoders.load(tmp_path / "it.safetensors").params, params)
    # Written again it is the same here, and there.
    interop.save_autoencoder(found, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, interop.load_autoencoder(tmp_path / "again").params, params)
    again = getattr(diffusers, kind).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_latents_scaled_by_channel_are_scaled_by_the_layers_beside_them(tmp_path):
    kind, fields = AUTOENCODERS["as in Stable Diffusion"]
    coder(kind, fields).save_pretrained(tmp_path / "it")
    found = interop.load_autoencoder(tmp_path / "it")
    scaling = {"shift": np.float32([0.3, -1.0, 0.0, 2.0]), "scale": np.float32([0.5, 2.0, 1.0, 0.1])}
    found = found._replace(params={**found.params, "scaling": scaling})
    interop.save_autoencoder(found, tmp_path / "out")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    ours = found.autoencoder.moments(found.params, x)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert theirs.config.scaling_factor == 1
    with torch.no_grad():
        spread = theirs.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
        decoded = theirs.decode(spread.mean).sample.numpy().transpose(0, 2, 3, 1)
    pairs = [(ours.mean, spread.mean), (ours.std, spread.std)]
    pairs = [(mine, array.numpy().transpose(0, 2, 3, 1)) for mine, array in pairs]
    for mine, wanted in [*pairs, (found.decode(found.params, ours.mean), decoded)]:
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    coder(*AUTOENCODERS["a codebook"]).save_pretrained(tmp_path / "codes")
    codes = interop.load_autoencoder(tmp_path / "codes")
    scaling = {"shift": np.zeros(3, np.float32), "scale": np.float32([1, 2, 3])}
    with pytest.raises(InputError, match="codebook are scaled by channel"):
        interop.save_autoencoder(codes._replace(params={**codes.params, "scaling": scaling}), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def assert_same_pipelines(found, wanted, *networks):
    """The same scheduler, and the same weights to the bit."""
    assert type(found.scheduler) is type(wanted.scheduler)
    for name in networks:
        theirs, ours = getattr(wanted, name).state_dict(), getattr(found, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_a_pipeline_of_latents_draws_the_same_images(tmp_path):
    """LDM's: a codebook, a network of its latents, and DDIM without clip."""
    vqvae = coder("VQModel", encoder((8, 16), num_vq_embeddings=11, scaling_factor=1.0))
    unet = network({**TINY, "in_channels": 3, "out_channels": 3})
    unet.conv_out.weight.data *= 0.05
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    pipeline = diffusers.LDMPipeline(vqvae, unet, scheduler)
    pipeline.save_pretrained(tmp_path / "ldm")
    trained = interop.load(tmp_path / "ldm")
    assert trained.model.image_shape == (8, 8, 3)
    assert trained.model.space.image_shape == (16, 16, 3)
    z = np.random.default_rng(3).standard_normal((2, 8, 8, 3)).astype(np.float32)
    wanted, begin = drawn_there(unet, scheduler, 10, z)
    table = samplers.make_table(trained.model.schedule, "ddim", 10, trained.config.sample.tau)
    found = sample(trained.model.apply_fn, trained.params, table, jax.random.key(0), 2, (8, 8, 3), x_init=begin)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
    with torch.no_grad():
        images = vqvae.decode(torch.from_numpy(wanted.transpose(0, 3, 1, 2).copy())).sample.clamp(-1, 1)
    wanted = np.round(127.5 * (images.numpy().transpose(0, 2, 3, 1) + 1))
    assert np.mean(np.abs(trained.model.space.decode(found) - wanted) > 1) < 0.01  # but where another code is nearest
    weights.save(tmp_path / "it.safetensors", trained)
    again = weights.load(tmp_path / "it.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    assert again.model.space.autoencoder.sha256 == trained.model.space.autoencoder.sha256
    interop.save(trained, tmp_path / "again")
    assert_same_pipelines(diffusers.LDMPipeline.from_pretrained(tmp_path / "again"), pipeline, "unet", "vqvae")


TRANSFORMERS = {
    "of latents": {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "num_layers": 3},
    "of pixels": {"sample_size": 16, "in_channels": 3, "patch_size": 4, "num_attention_heads": 3, "num_layers": 1},
    "of single pixels": {"sample_size": 4, "in_channels": 1, "patch_size": 1, "num_attention_heads": 1},
}


def transformer(**fields):
    torch.manual_seed(0)
    shared = {"attention_head_dim": 8, "num_embeds_ada_norm": 5, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(**{**shared, **fields}).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    for block in model.transformer_blocks[1:]:  # published files have one embedder, many times
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_read_from_its_folder_computes_the_same(name, tmp_path):
    model = transformer(**TRANSFORMERS[name])
    model.save_pretrained(tmp_path)
    trained = interop.load(tmp_path, scheduler=DDPM)
    embedder = sum(weight.numel() for weight in model.transformer_blocks[0].norm1.emb.parameters())
    wanted = sum(weight.numel() for weight in model.parameters()) - (len(model.transformer_blocks) - 1) * embedder
    assert sum(leaf.size for leaf in jax.tree.leaves(trained.params)) == wanted
    x, t, labels = images(model), np.array([0, 977]), np.array([4, 5])  # 5 is no class
    with torch.no_grad():
        seen = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        out = model(seen, timestep=torch.from_numpy(t), class_labels=torch.from_numpy(labels)).sample
    wanted = out.numpy().transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(trained.model.apply_fn)(trained.params, x, t + 1, labels)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_pipeline_of_dit_has_its_classes_latents_and_guidance(tmp_path):
    model, vae = transformer(**TRANSFORMERS["of latents"]), coder("AutoencoderKL", encoder((8, 8)))
    names = {number: f"kind {number}" for number in range(5)}
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))  # as the published one has it
    trained = interop.load(tmp_path)
    assert trained.model.conditions.names == tuple(names.values())
    assert trained.model.conditions.null == 5
    assert trained.model.space.image_shape == (16, 16, 3)
    assert trained.config.train.label_dropout > 0
    with pytest.raises(InputError, match=r"config\.model\.num_classes is 5; DiTPipeline of diffusers takes 1000 only"):
        interop.save(trained, tmp_path / "again")


def test_a_pipeline_of_dit_is_written_as_it_was_and_one_of_ours_is_told_times_from_0(tmp_path):
    model = transformer(**TRANSFORMERS["of latents"], num_embeds_ada_norm=1000)
    vae = coder("AutoencoderKL", encoder((8, 8)))
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "dit")
    trained = interop.load(tmp_path / "dit")
    interop.save(trained, tmp_path / "again")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "again")
    assert_same_pipelines(again, pipeline, "transformer", "vae")
    assert again.get_label_ids("7") == [7]
    # A transformer of ours counts its times from 1.
    config = trained.config.copy_and_resolve_references()
    config.transformer.time_shift = 0.0
    names, space = trained.model.conditions.names, trained.model.space
    ours = trained._replace(
        model=make_model(config, space.image_shape, names, autoencoder=space.autoencoder), config=config
    )
    interop.save(ours, tmp_path / "ours")
    written = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours").transformer
    x, t, labels = images(model), np.array([2, 977]), np.array([4, 1000])
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.jit(ours.model.apply_fn)(ours.params, x, t, labels))
    with torch.no_grad():
        seen = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        out = written(seen, timestep=torch.from_numpy(t - 1), class_labels=torch.from_numpy(labels)).sample
    np.testing.assert_allclose(out.numpy().transpose(0, 2, 3, 1), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_blocks_with_different_embedders_are_refused(tmp_path):
    model = transformer(**TRANSFORMERS["of latents"])
    model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"transformer_blocks\.2.*differs from transformer_blocks\.0"):
        interop.load(tmp_path, scheduler=DDPM)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistency_model_draws_the_same(steps, tmp_path):
    """With noise of ours in the place of theirs."""
    model = network({**TINY, "num_class_embeds": 3})
    scheduler = diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(model, scheduler).save_pretrained(tmp_path)
    trained = interop.load(tmp_path)
    assert trained.config.sample.steps == 1
    labels = np.array([2, 0])
    noise = [
        np.stack(
            [
                jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), k), (8, 8, 1))
                for i in (0, 1)
            ]
        )
        for k in range(steps + 1)
    ]
    drawn = iter(torch.from_numpy(z.transpose(0, 3, 1, 2).copy()) for z in noise)
    x = next(drawn) * scheduler.init_noise_sigma
    begin = x.numpy().transpose(0, 2, 3, 1)
    scheduler.set_timesteps(steps)
    place = "diffusers.schedulers.scheduling_consistency_models.randn_tensor"
    with torch.no_grad(), mock.patch(place, side_effect=drawn):
        for t in scheduler.timesteps:
            x = scheduler.step(
                model(scheduler.scale_model_input(x, t), t, torch.from_numpy(labels)).sample, t, x
            ).prev_sample
    wanted = x.numpy().transpose(0, 2, 3, 1)
    config = trained.config.sample
    table = samplers.make_table(trained.model.schedule, config.sampler, steps, config.tau)
    shared = {"prediction": trained.model.prediction, "clip": config.clip, "x_init": begin, "cond": labels}
    found = sample(trained.model.apply_fn, trained.params, table, jax.random.key(0), 2, (8, 8, 1), **shared)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.mean(np.abs(wanted) < 1) > 0.1  # or clipping would hide what differs
