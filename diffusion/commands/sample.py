"""Draws samples from a trained run: `python sample.py --steps=25 --sampler=ddim --eta=0`.

Samples the run that --workdir names, by its folder or a file of convert.py. Without it, takes the newest run in runs/,
or the digits model that ships with the project if nothing has been trained. Writes grid.png, samples.npz (uint8 images
and their ids) and sampling.json (all that is needed to repeat them) into --out. A large job is written in shards, and
the same command goes on where it was killed.
"""

import hashlib
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion import __version__, devices
from diffusion.commands import cli, jobs, samplers, shared_flags, sources, usage
from diffusion.images import sheet, write_gif, write_png

shared_flags.define_source_flags()
shared_flags.define_sampler_flags()
usage.group("What is drawn and written")
_NUM = flags.DEFINE_integer("num", 64, "Number of images, numbered from 0.", lower_bound=1, upper_bound=10**8)
_SEEDS = flags.DEFINE_string("seeds", None, "Draw the images of these numbers instead, as 0-63 or 5,7,100-199.")
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: one named after the sampler in the run folder.")
_PNG = flags.DEFINE_bool("png", False, "Also write every image as png/NUMBER.png.")
_GIF = flags.DEFINE_bool("gif", False, "Also write trajectory.gif, the first images on their way from noise.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the sampler's table and stop.")
_LIST = flags.DEFINE_bool("list", False, "Print the samplers, grids and guidance rules with their options, and stop.")


def main() -> None:
    devices.prepare()
    if _LIST.value:
        print(samplers.describe())
        return
    # What to draw.
    sampling = sources.open_sampling()
    ids = range(_NUM.value) if _SEEDS.value is None else jobs.parse_ids(_SEEDS.value)
    print(sampling.title(len(ids)))
    for note in sampling.notes():
        print(f"note: {note}")
    if _DRY_RUN.value:
        print(sampling.table)
        return
    # Where to; images of another job that are there give way.
    out = Path(_OUT.value or sampling.source.home / "samples" / _label(sampling)).expanduser()
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a folder that cannot be written is found now
    job = jobs.Job(out, ids, sampling.record())
    if job.replaces:
        print(f"note: this replaces the images of another job in {out} ({job.replaces})")
    mesh = devices.data_mesh()
    seconds = _draw(sampling, job, mesh)
    if job.replaces:  # not before, or a mistake would cost the pictures of the other job
        shutil.rmtree(out / "png", ignore_errors=True)
        (out / "trajectory.gif").unlink(missing_ok=True)

    # Pictures, then the record, which says that the job is complete.
    write_png(out / "grid.png", sheet(job.images(0)[:64]))
    if _PNG.value:
        _write_pngs(job)
    if _GIF.value:
        write_gif(out / "trajectory.gif", [sheet(frame) for frame in sampling.frames(ids[:64])])
    job.finish(
        seconds_with_compilation=round(seconds, 3),
        devices=devices.describe(mesh),
        versions={"diffusion": __version__, "jax": jax.__version__, "numpy": np.__version__},
    )
    print(f"{seconds:.1f} s, compilation included; wrote {out / 'grid.png'}, {job.path(0).name} and sampling.json")


def _draw(sampling, job, mesh):
    """Draws and writes the shards that are missing; returns how many seconds it took."""
    start = time.perf_counter()
    missing = job.missing()
    total = sum(map(len, job.shards))
    done = total - sum(len(job.shards[i]) for i in missing)
    if done:
        print(f"{done:,} of {total:,} images are there already")
    with tqdm(total=total, initial=done, unit="image", disable=None) as progress:
        for index in missing:
            batches = []
            for images in sampling.draw(job.shards[index], mesh, flags.FLAGS.batch_size):
                batches.append(images)
                progress.update(len(images))
            job.write(index, np.concatenate(batches), sampling.source.labels)
    return time.perf_counter() - start


def _write_pngs(job):
    """Writes every image of the job as png/NUMBER.png."""
    folder = job.out / "png"
    folder.mkdir(exist_ok=True)
    for index, ids in enumerate(job.shards):
        for number, image in zip(ids, job.images(index), strict=True):
            write_png(folder / f"{number:06}.png", image)


def _label(sampling):
    """Returns a folder name that tells jobs apart: what every job has, then the other options that were given."""
    parts = [sampling.sampler, f"{len(sampling.table.tau) - 1}steps", sampling.tau, f"seed{sampling.source.seed}"]
    parts[1:1] = [] if flags.FLAGS.eta is None else [f"eta{flags.FLAGS.eta:g}"]
    others = ("clip", "dynamic_threshold", "labels", "ema", *(n for n in flags.FLAGS if n.startswith("guidance_")))
    parts += [f"{name}={flags.FLAGS[name].value}" for name in others if not flags.FLAGS[name].using_default_value]
    label = re.sub(r"[^\w.=-]+", "-", "-".join(parts))
    # A long list of timesteps is too long for a file name.
    return label if len(label) <= 120 else f"{label[:100]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
