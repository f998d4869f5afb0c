"""Draws samples from a trained run: `python sample.py --steps=25 --sampler=ddim --eta=0`.

Samples the run that --workdir names, by its folder or a file of convert.py. Without it, takes the newest run in runs/,
or the digits model that ships with the project if nothing has been trained. Writes grid.png, samples.npz (uint8 images
and their ids) and sampling.json (all that is needed to repeat them) into --out. A large job is written in shards, and
the same command goes on where it was killed. `diffusion.evaluation.load_samples(folder)` reads either.
"""

import functools
import hashlib
import re
import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion import devices, files
from diffusion.autoencoder import MAX_PIXELS
from diffusion.commands import altering, batching, cli, edits, jobs, prompts, samplers, samplings, shared_flags, usage
from diffusion.conditions import Prompts
from diffusion.errors import printable
from diffusion.images import sheet, write_gif, write_png
from diffusion.sealed import digest_of
from diffusion.training import environment

shared_flags.define_source_flags()
shared_flags.define_sampler_flags()
altering.define_flags()
shared_flags.define_cache_flag()
edits.define_flags()
usage.group("What is drawn and written")
_NUM = flags.DEFINE_integer(
    "num",
    64,
    "Number of images, numbered from 0. Default of a text-to-image model: one for each prompt.",
    lower_bound=1,
    upper_bound=10**8,
)
_SEEDS = flags.DEFINE_string("seeds", None, "Draw the images of these numbers instead, as 0-63 or 5,7,100-199.")
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: one named after the sampler in the run folder.")
_PNG = flags.DEFINE_bool("png", False, "Also write every image as png/NUMBER.png.")
_NPZ = flags.DEFINE_bool("npz", False, "Also write arr_0.npz, all images as arr_0, which other evaluators read.")
_GIF = flags.DEFINE_bool("gif", False, "Also write trajectory.gif, the first images on their way from noise.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the sampler's table and stop.")
_LIST = flags.DEFINE_bool("list", False, "Print the samplers, grids and guidance rules with their options, and stop.")

LABEL = 64
"""The most characters in the name of a folder of samples."""


def main() -> None:
    devices.prepare()
    if _LIST.value:
        print(samplers.describe())
        return
    # What to draw.
    sampling = samplings.open_sampling()
    ids = _ids(sampling)
    print(sampling.title(len(ids)))
    for note in sampling.notes():
        print(f"note: {note}")
    if _DRY_RUN.value:
        print(sampling.table)
        return
    # Where to, before the work, so that a folder that cannot be written is found now.
    out = _make_folder(sampling, ids)
    with files.locked(out, "sampling into", ".sampling.lock"):
        _sample_into(out, ids, sampling)


def _ids(sampling):
    """Returns the numbers of the images."""
    if _SEEDS.value is not None:
        return jobs.parse_ids(_SEEDS.value)
    one_each = _told_prompts(sampling) and flags.FLAGS["num"].using_default_value and flags.FLAGS.interpolate is None
    return range(len(sampling.source.labels) if one_each else _NUM.value)


def _told_prompts(sampling):
    return isinstance(sampling.source.trained.model.conditions, Prompts)


def _shard(sampling):
    """Returns how many images a file has at most."""
    return jobs.TEXT_SHARD if _told_prompts(sampling) else jobs.SHARD


def _batch_size(sampling, mesh, job):
    """Returns how many images are drawn at a time: those of a text-to-image model are large."""
    if _told_prompts(sampling) and flags.FLAGS["batch_size"].using_default_value:
        height, width, _ = sampling.source.trained.model.space.image_shape
        return max(1, MAX_PIXELS // (height * width))
    return batching.size(flags.FLAGS.batch_size, sampling, mesh, max(map(len, job.shards)))


def _make_folder(sampling, ids):
    """Makes and returns the output folder; no link on the way from the run folder to it is followed."""
    home = sampling.source.home
    out = Path(_OUT.value or home / "samples" / _label(sampling, ids)).expanduser()
    below = out.absolute().is_relative_to(home.absolute())
    files.make_folder(out.absolute(), home.absolute() if below else None)
    return out


def _sample_into(out, ids, sampling):
    """Draws what is missing of the job in a folder; images of another job of one file give way."""
    job = jobs.Job(out, ids, sampling.record(), _shard(sampling))
    if job.replaces:
        print(f"note: this replaces the images of another job in {out} ({printable(job.replaces)})")
    if job.damaged:
        names = ", ".join(job.damaged[:3]) + " ..." * (len(job.damaged) > 3)
        print(f"note: {len(job.damaged)} file(s) are not as they were written, and are drawn again: {names}")
    mesh = devices.data_mesh()
    # Found when it is first asked for, as auto compiles a program, which a job that is complete has no use for.
    size = functools.cache(lambda: _batch_size(sampling, mesh, job))
    seconds = _draw(sampling, job, mesh, size)
    if job.replaces:  # not before, or a mistake would cost the pictures of the other job
        job.remove_pictures()

    # Pictures, then the record, which says that the job is complete.
    first = job.images(0)[:64]
    write_png(out / "grid.png", sampling.picture(first, ids[: len(first)]))
    if _PNG.value:
        job.write_pngs()
    if _NPZ.value:
        job.export()
    if _GIF.value:
        count = size() if _told_prompts(sampling) else 64
        write_gif(out / "trajectory.gif", [sheet(frame) for frame in sampling.frames(ids[:count])])
    job.finish(
        **_calls(sampling),
        seconds_with_compilation=round(seconds, 3),
        devices=devices.describe(mesh),
        versions=environment.versions(),
    )
    print(f"{seconds:.1f} s, compilation included; wrote {out / 'grid.png'}, {job.path(0).name} and sampling.json")


def _calls(sampling):
    """Returns how many network calls the images took that were drawn now, where no table says it, and prints it."""
    if not sampling.calls:
        return {}
    calls = sampling.calls
    found = {"images": len(calls), "least": min(calls), "most": max(calls), "mean": np.mean(calls)}
    print("network calls of an image: {least} to {most}, {mean:.1f} on average over {images:,}".format(**found))
    return {"calls_of_an_image": found}


def _draw(sampling, job, mesh, size):
    """Draws and writes the shards that are missing, size() images at a time; returns how many seconds it took."""
    start = time.perf_counter()
    missing = job.missing()
    total = sum(map(len, job.shards))
    done = total - sum(len(job.shards[i]) for i in missing)
    if done:
        print(f"{done:,} of {total:,} images are there already")
    with tqdm(total=total, initial=done, unit="image", disable=None) as progress:
        for index in missing:
            batches = []
            for images in sampling.draw(job.shards[index], mesh, size()):
                batches.append(images)
                progress.update(len(images))
            job.write(index, np.concatenate(batches), sampling.source.labels)
    return time.perf_counter() - start


def _label(sampling, ids):
    """Returns a short folder name that tells jobs apart: as many options as fit, and a digest of all if some do not."""
    given = flags.FLAGS
    sampler = sampling.sampler
    if samplers.is_file(sampler):  # known by what is in it, wherever it lies
        sampler = f"{Path(sampler).stem}-{hashlib.sha256(sampling.table.to_json().encode()).hexdigest()[:8]}"
    adaptive = sampling.calls is not None  # which has no steps, and of a grid only the start
    length = f"from{sampling.table.tau[0]:g}" if adaptive else f"{len(sampling.table.tau) - 1}steps"
    parts = [sampler, length, sampling.tau, f"seed{sampling.source.seed}"]
    parts[1:1] = [] if given.eta is None else [f"eta{given.eta:g}"]
    if len(ids) > _shard(sampling):  # so that it never meets a job of one file
        parts.append(f"{len(ids)}images" + f"={jobs.write_ids(ids)}" * (_SEEDS.value is not None))
    others = ("clip", "dynamic_threshold", "labels", "ema", "cache", *(n for n in given if n.startswith("guidance_")))
    others += (*altering.FLAGS, *(name for name in prompts.FLAGS if name != "prompts"))
    if given.prompts is not None:  # known by what is in it
        parts.append(f"prompts={digest_of(sampling.source.settings)[:8]}")
    for name in others:
        if not given[name].using_default_value:
            weaker = name == "guidance_model"
            value = sampling.source.settings["guidance_model_sha256"][:8] if weaker else given[name].value
            parts.append(f"{name}={','.join(value) if isinstance(value, list) else value}")
    if sampling.edit is not None:
        parts.append(sampling.edit.label)
    parts = list(filter(None, parts))
    # The first parts that fit, in characters that every file system takes.
    names = [re.sub(r"[^\w.=+-]+", "-", part, flags=re.ASCII) for part in parts]
    label = "-".join(names)
    if len(label) <= LABEL:
        return label
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    names = [re.split("[:=]", part)[0] if len(part) > 20 else name for part, name in zip(parts, names, strict=True)]
    while len("-".join(names)) > LABEL - 9:
        del names[-1]
    return "-".join([*names, digest])


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
