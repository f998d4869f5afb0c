"""A model that torch has trained is sampled here, and one that is trained here is sampled in diffusers.

    python train.py --config=configs/digits.py --config.network=unet2d \
        --config.unet2d.block_out_channels=32,64 --config.unet2d.norm_num_groups=8 \
        --config.unet2d.down_block_types="('DownBlock2D','AttnDownBlock2D')" \
        --config.unet2d.up_block_types="('AttnUpBlock2D','UpBlock2D')" \
        --config.train.num_steps=1500 --workdir=runs/unet2d
    python -m benchmarks.both_ways [--seconds=180] [--workdir=runs/unet2d]

Trains diffusers' UNet2DModel on the digits in torch for so many seconds, saves its pipeline, and prints the Frechet
distance of 1,797 samples on pixels, 25 DDIM steps, drawn by their DDIMScheduler and by this library. Then writes the
run with `interop.diffusers.save`, draws from one noise in both, and prints how far the pictures are apart. It needs
torch and diffusers, as the tests in tests/agreement do.
"""

import tempfile
import time
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch
from absl import flags

from diffusion import data, sample, solvers
from diffusion.commands import cli
from diffusion.evaluation import features
from diffusion.images import to_floats, to_uint8
from diffusion.interop import diffusers as interop
from diffusion.timesteps import GRIDS
from diffusion.training import run_folder

_SECONDS = flags.DEFINE_integer("seconds", 180, "How long torch trains.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "A run with config.network=unet2d.")

STEPS, COUNT, BATCH = 25, 1797, 64
NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def main() -> None:
    real = data.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).standard_normal((COUNT, 8, 8, 1)).astype(np.float32)
        model, scheduler = trained_there(to_floats(real.images))
        diffusers.DDIMPipeline(model, scheduler).save_pretrained(Path(folder, "theirs"))
        theirs, ours = drawn_there(model, scheduler, noise), drawn_here(interop.load(Path(folder, "theirs")), noise)
        space = features.pixels()
        reference = features.make_reference(space, real, Path(folder, "cache"))
        for name, images in (("diffusers", theirs), ("here", ours)):
            found = space.extract(images)
            (distance,) = features.measure(reference, found, ["frechet"]).values()
            print(f"trained in torch, sampled by {name:9}: Frechet distance on pixels {distance:.4f}")
        compare("trained in torch", theirs, ours)
        if _WORKDIR.value:
            trained = run_folder.load_trained(run_folder.existing(_WORKDIR.value))
            interop.save(trained, Path(folder, "ours"))
            pipeline = diffusers.DDIMPipeline.from_pretrained(Path(folder, "ours"))
            scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
            noise = noise[:BATCH]
            there = drawn_there(pipeline.unet, scheduler, noise)
            compare("trained here", there, drawn_here(trained, noise, scheduler.config.timestep_spacing))


def trained_there(images):
    """Returns (network, scheduler), trained in torch."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**NETWORK)
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    optimizer, start, steps = torch.optim.AdamW(model.parameters(), lr=1e-3), time.monotonic(), 0
    pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    while time.monotonic() - start < _SECONDS.value:
        clean = pictures[torch.randint(len(pictures), (BATCH,))]
        eps, t = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        loss = (model(scheduler.add_noise(clean, eps, t), t).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    print(f"torch made {steps:,} steps in {time.monotonic() - start:.0f} s, the last with a loss of {loss.item():.4f}")
    return model.eval(), scheduler


def drawn_there(model, scheduler, noise):
    """Returns uint8 images that their scheduler draws from noise."""
    drawn = []
    for start in range(0, len(noise), 256):
        scheduler.set_timesteps(STEPS)
        x = torch.from_numpy(np.ascontiguousarray(noise[start : start + 256].transpose(0, 3, 1, 2)))
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample
        drawn.append(x.numpy().transpose(0, 2, 3, 1))
    return to_uint8(np.concatenate(drawn))


def drawn_here(trained, noise, spacing="leading"):
    """Returns uint8 images that this library draws from the same noise."""
    model = trained.model
    table = solvers.ddim(model.schedule, GRIDS[spacing](model.schedule, STEPS))
    shared = {"prediction": model.prediction, "x_init": noise}
    x = sample(model.apply_fn, trained.params, table, jax.random.key(0), len(noise), model.image_shape, **shared)
    return to_uint8(np.asarray(x))


def compare(name, theirs, ours):
    """Prints how far pictures of the same noise are apart."""
    apart = np.abs(theirs.astype(int) - ours)
    print(f"{name}: of {apart.size:,} pixels {np.mean(apart > 0):.2%} differ, at most by {apart.max()} of 255")


if __name__ == "__main__":
    cli.start(main, about=__doc__)
