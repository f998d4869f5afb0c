"""A folder of a text-to-image pipeline, tiny and with random weights, made without torch and without diffusers."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from diffusion import keys
from diffusion.autoencoder import make_autoencoder
from diffusion.interop.diffusers import autoencoders, clip_text, unet2d, unet2d_condition
from diffusion.interop.diffusers.state import to_tensors
from diffusion.models import CLIPText, UNet2DCondition

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 4,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 540,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def unet_params(seed=0, in_channels=4):
    fields, found = unet2d_condition.read_fields("", UNET)
    network = UNet2DCondition(**fields, out_channels=found["out_channels"])
    x = np.zeros((1, 4, 4, in_channels), np.float32)
    return random_like(jax.eval_shape(lambda k: network.init(k, x, np.ones(1))["params"], keys.make(0)), seed)


def save_tokenizer(folder: Path, **config) -> None:
    """One token for each byte, and one for each byte that ends a word."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8, **config}))


def save_part(folder: Path, config: dict, tensors: dict, stem: str = "diffusion_pytorch_model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / f"{stem}.safetensors")


def save_pipeline(folder: Path, in_channels: int = 4) -> Path:
    """Writes the folder, of an inpainting pipeline if its network sees 9 channels; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    tensors = to_tensors(unet_params(in_channels=in_channels), unet2d.name_of)
    save_part(folder / "unet", {**UNET, "in_channels": in_channels}, tensors)
    text = CLIPText(**clip_text.read_fields("", TEXT))
    save_part(
        folder / "text_encoder", TEXT, to_tensors(random_like(clip_text.shapes_of(text), 1), clip_text.name_of), "model"
    )
    fields = {"channels": (8, 8), "num_blocks": 1, "latent_channels": 4, "groups": 4}
    shapes = jax.eval_shape(make_autoencoder(fields, (8, 8, 3)).init, keys.make(0))
    params = {name: part for name, part in random_like(shapes, 2).items() if name != "scaling"}
    save_part(folder / "vae", VAE, to_tensors(params, lambda path: autoencoders.name_of(path, 2)))
    save_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder
