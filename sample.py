"""Draws samples from a trained run: `python sample.py --steps=25 --sampler=ddim --eta=0`.

Takes the newest run in runs/, or the one that --workdir names. Writes grid.png, samples.npz (uint8 images and their
ids) and sampling.json (all that is needed to repeat them) into --out.
"""

import io
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diffusion import __version__, cli, devices, files, timesteps

cli.define_sampling_flags()
_NUM = flags.DEFINE_integer("num", 64, "Number of images.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: one named after the sampler in the run folder.")


def main() -> None:
    devices.one_device_per_core()
    run = cli.open_run()
    mesh = devices.data_mesh()
    num, seed = _NUM.value, flags.FLAGS.seed
    print(run.title(num))
    for note in _notes(run):
        print(f"note: {note}")
    label = f"{run.sampler}-{run.steps}steps-eta{run.eta:g}-{run.tau}-{run.clip}-seed{seed}".replace(":", "-")
    out = Path(_OUT.value or run.folder.path / "samples" / label)
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a folder that cannot be written is found now

    start = time.perf_counter()
    images = cli.draw(run, num, mesh)
    seconds = time.perf_counter() - start

    record = {
        "run": str(run.folder.path),
        "checkpoint_step": run.trained.step,
        **{name: getattr(run, name) for name in ("sampler", "steps", "eta", "clip")},
        "grid": run.tau,
        "tau": run.table.tau.tolist(),
        "nfe": run.table.nfe,
        "seed": seed,
        "num": num,
        "seconds_with_compilation": round(seconds, 3),
        "devices": devices.describe(mesh),
        "versions": {"diffusion": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "config": run.trained.config.to_dict(),
    }
    arrays = io.BytesIO()
    np.savez_compressed(arrays, samples=images, ids=np.arange(num))
    files.write_atomically(out / "samples.npz", arrays.getvalue())
    files.write_png(out / "grid.png", files.grid(images))
    files.write_json(out / "sampling.json", record)
    print(f"{seconds:.1f} s, compilation included; wrote {out / 'grid.png'}, samples.npz and sampling.json")


def _notes(run):
    """What the user may not expect of the grid."""
    start, schedule = run.table.tau[0], run.trained.model.schedule
    if run.tau in timesteps.GRIDS and len(run.table.tau) - 1 != run.steps:
        yield f"tau {run.tau} makes {len(run.table.tau) - 1} steps of --steps={run.steps}"
    if start < schedule.num_timesteps:
        yield (
            f"tau starts at {start:g}, below T = {schedule.num_timesteps}: starting from pure noise leaves out the "
            f"signal there, {schedule.powers(start)[0]:.2g} of the power"
        )


if __name__ == "__main__":
    cli.run(main)
