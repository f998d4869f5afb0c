"""Draws samples from a trained run: `python sample.py --steps=25 --sampler=ddim --eta=0`.

Takes the newest run in runs/, or the one that --workdir names. Writes grid.png, samples.npz (uint8 images and their
ids) and sampling.json (all that is needed to repeat them) into --out.
"""

import io
import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion import __version__, cli, devices, experiment, files, timesteps
from diffusion.generate import generate
from diffusion.training import run_folder

cli.define_sampling_flags()
_NUM = flags.DEFINE_integer("num", 64, "Number of images.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: one named after the sampler in the run folder.")


def main() -> None:
    devices.one_device_per_core()
    seed, num, batch_size, workdir = (flags.FLAGS[name].value for name in ("seed", "num", "batch_size", "workdir"))
    folder = run_folder.existing(workdir) if workdir else run_folder.newest("runs")
    model, params, config, step = experiment.load_trained(folder)
    options = cli.sampling_options(config.sample)
    table = experiment.make_table(model.schedule, options.sampler, options.steps, options.eta, options.tau)
    print(f"{folder.path}, step {step:,}: {num} images with {table.name}, {table.nfe} network calls each")
    for note in _notes(model.schedule, table, options):
        print(f"note: {note}")

    label = f"{options.sampler}-{options.steps}steps-eta{options.eta:g}-{options.tau}-{options.clip}-seed{seed}"
    out = Path(_OUT.value or folder.path / "samples" / label.replace(":", "-"))
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    batches = []
    mesh = devices.data_mesh()
    drawn = generate(model, params, table, range(num), seed=seed, mesh=mesh, batch_size=batch_size, clip=options.clip)
    with tqdm(total=num, unit="image", disable=None) as progress:
        for images in drawn:
            batches.append(images)
            progress.update(len(images))
    images = np.concatenate(batches)
    seconds = time.perf_counter() - start

    record = {
        "run": str(folder.path),
        "checkpoint_step": step,
        **options._asdict(),
        "tau": table.tau.tolist(),
        "tau_name": options.tau,
        "nfe": table.nfe,
        "seed": seed,
        "num": num,
        "seconds": round(seconds, 3),
        "seconds_include": "compilation",
        "devices": devices.describe(mesh),
        "versions": {"diffusion": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "config": config.to_dict(),
    }
    arrays = io.BytesIO()
    np.savez_compressed(arrays, samples=images, ids=np.arange(num))
    files.write_atomically(out / "samples.npz", arrays.getvalue())
    files.write_atomically(out / "grid.png", files.grid_png(images))
    files.write_atomically(out / "sampling.json", (json.dumps(record, indent=2) + "\n").encode())
    print(f"{seconds:.1f} s, compilation included; wrote {out / 'grid.png'}, samples.npz and sampling.json")


def _notes(schedule, table, options):
    """What the user may not expect of the grid."""
    tau = table.tau
    if options.tau in timesteps.GRIDS and len(tau) - 1 != options.steps:
        yield f"tau {options.tau} makes {len(tau) - 1} steps of --steps={options.steps}"
    if tau[0] < schedule.num_timesteps:
        yield (
            f"tau starts at {tau[0]:g} of {schedule.num_timesteps}, where {schedule.powers(tau[0])[0]:.2g} of the power is "
            "still signal; starting from pure noise leaves that out"
        )


if __name__ == "__main__":
    cli.run(main)
