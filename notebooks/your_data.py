# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own images
#
# From a folder of pictures to samples. The pictures here are drawn on the spot, and the network and the run are as
# small as they can be, so that everything takes about a minute on a laptop; the last cell says what to change for
# real.

# %%
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import diffusion
from diffusion import data, sample, solvers, timesteps
from diffusion.images import sheet, to_uint8
from diffusion.training import run_folder

REPOSITORY = Path(diffusion.__file__).parents[1]
workspace = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder
#
# Any tree of JPEG, PNG, WebP, TIFF or BMP files, or a .zip or .tar of one. Sizes may differ. Sub-folders are classes,
# and the folders in them belong to them. Here: 400 discs and crosses.

# %%
rng = np.random.default_rng(0)
for number in range(400):
    shape = ("cross", "disc")[number % 2]
    size = int(rng.integers(40, 80))
    picture = Image.new("L", (size, size), "black")
    (left, top), radius = size * rng.uniform(0.1, 0.3, 2), size * rng.uniform(0.25, 0.33)
    right, bottom = left + 2 * radius, top + 2 * radius
    draw, grey, width = ImageDraw.Draw(picture), int(rng.integers(140, 256)), size // 7
    if shape == "disc":
        draw.ellipse([left, top, right, bottom], fill=grey)
    else:
        draw.line([left, top, right, bottom], fill=grey, width=width)
        draw.line([left, bottom, right, top], fill=grey, width=width)
    path = workspace / "pictures" / shape / f"{number:04}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)

# %% [markdown]
# ## What the network will see
#
# `data.load("images", ...)` is what training calls: it crops to a square, scales, and finds the classes. Looking at
# it first costs nothing.

# %%
dataset = data.load("images", path=str(workspace / "pictures"), size=8, channels=1)
print(dataset.images.shape, dataset.images.dtype, dataset.counts())


def show(images, title, columns=12):
    """images: uint8 [N, H, W, C]."""
    plt.figure(figsize=(8, 2.4), layout="constrained")
    plt.imshow(sheet(images, columns=columns))
    plt.title(title, fontsize="medium")
    plt.axis("off")
    plt.show()


show(dataset.images[np.r_[:12, 200:212]], "from the folder, 8 x 8")

# %% [markdown]
# ## A config, as flags
#
# `configs/images.py` is the recipe for folders; flags change its fields. A file of your own in `configs/` that
# changes the same fields does the same and can be kept. A misspelt field ends in one line that names the nearest
# valid one.

# %%
run = workspace / "run"
fields = {
    "data.path": workspace / "pictures",
    "data.size": 8,
    "data.channels": 1,  # grey
    "schedule": "cosine",  # few pixels want little noise
    "model.width": 32,
    "model.multipliers": "(1,)",
    "model.num_blocks": 1,
    "model.attention_resolutions": "()",
    "model.num_classes": 2,  # 0 to ignore the sub-folders
    "model.dropout": 0.0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 20,
    "optimizer.decay": "cosine",
    "train.num_steps": 300,
    "train.batch_size": 32,
    "train.ema_decays": "(0.98,)",
    "train.log_every": 10,
    "train.save_every": 300,
    "train.grid_every": 300,
    "sample.num": 16,
}
command = ["train.py", "--config=configs/images.py", f"--workdir={run}"]
command += [f"--config.{name}={value}" for name, value in fields.items()]
wrong = subprocess.run(
    [sys.executable, *command, "--config.train.nun_steps=1"], cwd=REPOSITORY, capture_output=True, text=True
)
print(wrong.returncode, wrong.stderr.strip().splitlines()[-1])

# %% [markdown]
# ## Training
#
# The same command again would resume. Ctrl-C saves the step in progress.

# %%
finished = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
assert finished.returncode == 0, finished.stderr
print(finished.stdout.replace(str(workspace), "WORKSPACE"))

with (run / "metrics.csv").open() as file:
    rows = list(csv.DictReader(file))
fig, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.semilogy([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
axis.set(xlabel="training step", ylabel="mean squared error of eps")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Sampling
#
# `load_trained` gives the newest good checkpoint: the model, the weights of an EMA, and the config. From there it is a
# table and a call. (`python sample.py --workdir=... --steps=10 --sampler=unipc` does this from a shell.)

# %%
model, params, config, step, ema = run_folder.load_trained(run_folder.existing(run))
tau = timesteps.uniform(model.schedule, 20)
table = solvers.ddim(model.schedule, tau)
labels = jnp.arange(24) // 12  # a row of crosses, a row of discs
images = sample(
    model.apply_fn,
    params,
    table,
    jax.random.key(0),
    24,
    model.image_shape,
    clip="recompute",
    cond=labels,
    null_cond=model.conditions.nulls(24),
    guidance_scale=2.0,
)
show(to_uint8(images), f"step {step:,}: {table.nfe} steps of DDIM, guidance 2; crosses above, discs below")

# %% [markdown]
# Which sampler, how many steps? Change the table; nothing else.

# %%
for name, S in [("ddim", 5), ("dpm_solver_pp", 5)]:
    table = solvers.SOLVERS[name](model.schedule, timesteps.uniform(model.schedule, S))
    few = sample(model.apply_fn, params, table, jax.random.key(0), 24, model.image_shape, clip="recompute", cond=labels)
    show(to_uint8(few), f"{name}, {S} steps, no guidance")

# %% [markdown]
# ## For real
#
# Drop the fields above but `data.path`, `data.size` and `model.num_classes`: `configs/images.py` then has DDPM's
# network (35.7M parameters) and 800,000 steps, for a GPU. `--config.model.width` and `--config.train.num_steps` scale
# it down, and `--config.model.dtype=bfloat16` saves memory. A set larger than `config.data.max_memory` is read from
# disk while training.
