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
# # A folder of diffusers, and a table to take back
#
# This notebook loads a pipeline as diffusers' `save_pretrained` writes it, draws with five samplers, learns a sampler
# of three network calls for it, and puts that beside the pipeline, where diffusers runs it. Neither torch nor diffusers
# is needed here. For a model of yours, set `FOLDER` to its folder, or to its id on the Hugging Face Hub, as
# `google/ddpm-cifar10-32`; without one, a small network of digits is trained and written first. All of it takes about a
# minute and a half on two CPU cores that others use as well (AMD EPYC, November 2026).

# %%
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import diffusion
from diffusion import sample, solvers, timesteps
from diffusion.images import sheet
from diffusion.interop import diffusers
from diffusion.training import run_folder

FOLDER = ""
REPOSITORY = Path(diffusion.__file__).parents[1]
workspace = Path(tempfile.mkdtemp())


def program(name, *arguments):
    """Runs a program of the project in the workspace, as in a shell, and prints the end of what it says."""
    command = [sys.executable, str(REPOSITORY / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    print("\n".join(result.stdout.splitlines()[-6:]) if result.returncode == 0 else result.stderr)


# %% [markdown]
# ## A folder
#
# `config.network=unet2d` is diffusers' `UNet2DModel`, so what is trained with it becomes a pipeline of diffusers.

# %%
if not FOLDER:
    levels = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    program(
        "train",
        f"--config={REPOSITORY / 'configs' / 'digits.py'}",
        "--config.network=unet2d",
        "--config.unet2d.block_out_channels=16,32",
        f"--config.unet2d.down_block_types={levels[0]}",
        f"--config.unet2d.up_block_types={levels[1]}",
        "--config.unet2d.layers_per_block=1",
        "--config.unet2d.norm_num_groups=4",
        "--config.unet2d.attention_head_dim=16",
        "--config.train.batch_size=64",
        "--config.train.num_steps=500",
        "--workdir=runs/digits",
    )
    FOLDER = workspace / "pipeline"
    diffusers.save(run_folder.load_trained(run_folder.existing(workspace / "runs" / "digits")), FOLDER)
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        print(path.relative_to(FOLDER), path.stat().st_size)

# %% [markdown]
# ## What it holds
#
# The network, its parameters, and what its scheduler says: the noise schedule, what the network predicts, and the
# sampler and steps that whoever wrote the folder had in mind.

# %%
trained = diffusers.load(FOLDER)
model, params = trained.model, trained.params
print(trained.config.schedule, "|", model.prediction, "|", trained.clip, "|", dict(trained.config.sample))
print(model.image_shape, f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Five samplers
#
# Each is a table, and all start from the same noise. They begin at 0.9 T, as high orders do badly in the last tenth,
# where there is next to nothing but noise. 64 steps of UniPC stand for the exact solution of the probability flow; the
# figure is how far the samples of five network calls are from those.

# %%
grid = timesteps.uniform(model.schedule, 5, 0.9)
tables = {
    "DDIM": solvers.ddim(model.schedule, grid),
    "PLMS": solvers.plms(model.schedule, grid),
    "DPM-Solver++": solvers.dpm_solver_pp(model.schedule, grid, order=2),
    "DEIS": solvers.deis(model.schedule, grid, order=2),
    "UniPC": solvers.unipc(model.schedule, grid, order=2),
}


def draw(table, count=48):
    """Returns samples of one noise, whatever the table."""
    shared = {"prediction": model.prediction, "clip": trained.clip}
    return np.asarray(sample(model.apply_fn, params, table, jax.random.key(0), count, model.image_shape, **shared))


def distance(samples):
    """Returns how far samples are from the exact ones, the root of the mean square."""
    return float(np.sqrt(np.mean((samples - exact) ** 2)))


exact = draw(solvers.unipc(model.schedule, timesteps.uniform(model.schedule, 64), order=3))
drawn = {name: draw(table) for name, table in tables.items()}
for name, samples in drawn.items():
    print(f"{name:14} {distance(samples):.4f}")

# %%
figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for axis, (name, samples) in zip(axes.flat, {"exact": exact, **drawn}.items(), strict=True):
    axis.imshow(sheet(model.space.decode(samples), columns=8), cmap="gray")
    axis.set_title(name, fontsize="medium")
    axis.axis("off")

# %% [markdown]
# ## A table of three calls
#
# `learn.py` takes the folder as it is. It needs no data, as it follows the network's own paths. A real search has 128
# noises and a teacher of 64 calls, which are its defaults.

# %%
program("learn", f"--workdir={FOLDER}", "--calls=3", "--noises=64", "--teacher_calls=20")
(path,) = workspace.glob("runs/*/tables/3.json")
learned = solvers.from_json(path.read_text())
print(learned)

# %%
three = timesteps.uniform(model.schedule, 3, 0.9)
for name, table in (("learned", learned), ("UniPC", solvers.unipc(model.schedule, three, order=2))):
    print(f"{name:8} {table.nfe} calls  {distance(draw(table)):.4f}")

# %% [markdown]
# ## Back to diffusers
#
# A table is a JSON file, and `table_scheduler.py` is one file that needs torch and diffusers only. Both go to where the
# pipeline is used; `clip` is what `trained.clip` says:
#
# ```python
# from diffusers import DDPMPipeline
# from table_scheduler import TableScheduler
#
# pipeline = DDPMPipeline.from_pretrained("pipeline")
# pipeline.scheduler = TableScheduler.from_file("3.json", clip="keep_eps")
# images = pipeline(batch_size=16, num_inference_steps=3).images
# ```

# %%
back = workspace / "back"
back.mkdir()
shutil.copy(path, back)
shutil.copy(REPOSITORY / "diffusion" / "interop" / "table_scheduler.py", back)
if not diffusers.is_id(FOLDER):
    shutil.copytree(FOLDER, back / "pipeline")
print(*sorted(str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()), sep="\n")
