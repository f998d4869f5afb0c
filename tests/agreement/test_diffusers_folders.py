"""Folders that diffusers' save_pretrained writes are read here without it, and compute and draw the same."""

import jax
import numpy as np
import pytest

from diffusion.interop import diffusers as interop

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("torchvision"),
]

DDPM = {"_class_name": "DDPMScheduler"}

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
        found = jax.jit(trained.model.apply_fn)(trained.params, x, t + 1, cond)  # their timesteps count from 0
    wanted = theirs(model, x, t, cond)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.std(wanted) > 1e-3


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_network_read_from_its_folder_computes_the_same(name, tmp_path):
    model = network(CONFIGURATIONS[name])
    model.save_pretrained(tmp_path)
    trained = interop.load(tmp_path, scheduler=DDPM)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained.params)) == sum(w.numel() for w in model.parameters())
    assert_equal_networks(model, trained)
