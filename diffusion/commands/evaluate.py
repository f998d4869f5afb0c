"""Measures a trained model: `python evaluate.py --samplers=ddim,ddpm --steps=5,10,25 --etas=0,1`.

Draws as many samples as there are real images (or --num) with every sampler, number of steps and eta, and compares them
with the real ones in a space of features: pixels, a classifier trained on the data, or Inception. Only the distance in
Inception's space is called FID. Writes evaluation.csv, evaluation.json (everything needed to repeat a row) and
evaluation.png; the same command goes on with the row where it was stopped. `--guidance=1,1.5,2,3,4` measures every row
at these scales, and draws guidance.png.

Of an autoencoder's run it measures how near the images that it gives back come to those it was given: their PSNR, SSIM
and distance in the space of features, in reconstruction.csv, .json and .png.

`python evaluate.py --bound=10,25` prints the variational bound of the data in bits per dimension instead, for each
variance and number of steps, and writes bound.json with the part of every step. `--likelihood=25,50` prints the data's
likelihood under the probability flow, solved in 25 and in 50 steps, and writes likelihood.json.

`python evaluate.py --rank --calls=5,10` tries all solvers on all grids with at most so many network calls, prints those
whose samples come nearest to a solution in many steps, and writes ranking.csv.
"""

import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion import data, devices, files, options
from diffusion.commands import (
    aliases,
    altering,
    batching,
    bits,
    cli,
    datasets,
    drawing,
    feature_spaces,
    own,
    prompts,
    ranking,
    reconstructions,
    samplers,
    samplings,
    shared_flags,
    sources,
    students,
    sweep,
    usage,
)
from diffusion.conditions import Conditions
from diffusion.errors import InputError
from diffusion.evaluation import bound, features
from diffusion.training import environment

shared_flags.define_source_flags()
usage.group("The samples")
_SAMPLERS = flags.DEFINE_string("samplers", None, "As sample.py's --sampler, with commas. Default: the run's.")
_STEPS = flags.DEFINE_list("steps", None, "Numbers of steps, as 5,10,25. Default: the run's config.sample.steps (25).")
_ETAS = flags.DEFINE_list("etas", None, "Values for the samplers that have an eta, as 0,1. Default: the sampler's own.")
_GUIDANCE = flags.DEFINE_list("guidance", None, "Scales of the guidance, each in a row of its own, as 1,1.5,2,3,4.")
_TAU = flags.DEFINE_string("tau", None, "Timesteps to visit, as sample.py's --tau. Default: config.sample.tau.")
altering.define_flags()
shared_flags.define_cache_flag()
usage.group("What they are compared with, and how")
_FEATURES = flags.DEFINE_string("features", None, "pixels, classifier or inception. Default: pixels for digits.")
_METRICS = flags.DEFINE_list(
    "metrics",
    ["frechet", "prdc"],
    "frechet, kernel, score, prdc, accuracy; in Inception's space the first three are fid, kid, is.",
)
_INCEPTION = flags.DEFINE_string("inception", None, "File of the standard Inception weights. Default: downloaded.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Images to measure or compare with instead of the run's own: digits, cifar10, or a folder or archive. For a folder "
    "of diffusers, which does not say what it was trained on.",
)
_SPLIT = flags.DEFINE_string("split", None, "Part of the data to measure or compare with, as test. Default: the run's.")
_NUM = flags.DEFINE_integer(
    "num", None, "Number of samples. Default: as many as real images.", lower_bound=2, upper_bound=10**6
)
usage.group("Bounds and likelihoods, in place of samples")
_FIRST = flags.DEFINE_integer(
    "first", None, "Images that --bound and --likelihood take, or an autoencoder. Default: all.", lower_bound=1
)
_BOUND = flags.DEFINE_list("bound", None, "Print the variational bound with each of these numbers of steps, as 10,25.")
_VARIANCES = flags.DEFINE_list(
    "variances",
    None,
    f"With --bound: of {', '.join(bound.BOUND_VARIANCES)}. Default: those that the model can be sampled with.",
)
_LIKELIHOOD = flags.DEFINE_list(
    "likelihood", None, "Print the likelihood under the probability flow with each of these numbers of steps, as 25,50."
)
usage.group("A ranking of samplers")
_RANK = flags.DEFINE_bool(
    "rank", False, "Rank all solvers and grids, or those of --samplers and --tau, by their distance to many steps."
)
_CALLS = flags.DEFINE_list("calls", None, "With --rank: budgets of network calls, as 5,10.")
usage.group("Where the figures go")
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: the run folder.")

OF_DRAWING = ("samplers", "steps", "etas", "metrics", "num", "labels", "dynamic_threshold", "cache")
OF_DRAWING += ("guidance", "guidance_scale", "guidance_interval", "guidance_rescale", "guidance_rule", "guidance_model")
OF_DRAWING += altering.FLAGS
"""The flags that only matter if samples are drawn."""

NOT_RANKED = ("steps", "etas", "guidance", "metrics", "features", "inception", "data", "split", "first", "cache")
NOT_RANKED += ("bound", "variances", "likelihood", *altering.FLAGS)

OF_SAMPLES = (*OF_DRAWING, "features", "inception")
"""The flags that only matter where samples, or what an autoencoder gives back, are measured."""


def main() -> None:
    devices.prepare()
    if _RANK.value:
        _refuse(NOT_RANKED, "does nothing with --rank")
        if _CALLS.value is None:
            raise InputError("--rank needs budgets of network calls; add --calls=5,10")
    else:
        _refuse(["calls"], "is for --rank")
    of_samples = _BOUND.value is None and _LIKELIHOOD.value is None
    if not of_samples:
        _refuse(OF_SAMPLES, "is for samples, which --bound and --likelihood do not draw")
    if _BOUND.value is None and _LIKELIHOOD.value is not None:
        _refuse(["tau", "clip"], "goes with --bound or samples, not with --likelihood alone")
    if _BOUND.value is None:
        _refuse(["variances"], "goes with --bound")
    found = reconstructions.open_autoencoder(flags.FLAGS.workdir, flags.FLAGS.ema or "")
    if found is not None:
        return measure_autoencoder(found)
    if of_samples:
        _refuse(["first"], "goes with --bound and --likelihood, or an autoencoder")
    source = sources.open_source()
    out = Path(_OUT.value or source.home).expanduser()
    if _RANK.value:
        names = None if _SAMPLERS.value is None else options.split(_SAMPLERS.value)
        return ranking.rank(ranking.plan(source, _CALLS.value, names, _TAU.value, _NUM.value), out)
    if of_samples:
        return measure_samples(source, out)
    size, load = batching.fixed(flags.FLAGS.batch_size, "a bound or likelihood"), partial(_first_images, source)
    if _BOUND.value is not None:
        tau = source.trained.config.sample.tau if _TAU.value is None else _TAU.value
        bits.measure_bound(source, out, sweep.numbers("bound", _BOUND.value, int), tau, load, size, _VARIANCES.value)
    if _LIKELIHOOD.value is not None:
        bits.measure_likelihood(source, out, sweep.numbers("likelihood", _LIKELIHOOD.value, int), load, size)


def measure_autoencoder(found: reconstructions.Source) -> None:
    """Measures how near what an autoencoder gives back comes to the images of its data."""
    size = batching.fixed(flags.FLAGS.batch_size, "an autoencoder")
    useless = [*OF_DRAWING, *prompts.FLAGS, "tau", "clip", "bound", "likelihood", "rank"]
    _refuse(useless, f"does nothing for {found.name}, an autoencoder")
    section = found.trained.config.data.copy_and_resolve_references()
    if _DATA.value is not None:
        section = datasets.named(_DATA.value, found.trained.autoencoder.image_shape)
    datasets.check_known(section)
    own = datasets.load_data(section)
    if _SPLIT.value is not None:
        section.split = _SPLIT.value
    real = _first(own if _SPLIT.value is None else datasets.load_data(section))
    # The classifier is that of the data it was trained on, also where another part is given back.
    name = _FEATURES.value or ("pixels" if max(real.images.shape[1:3]) <= features.MAX_PIXELS else "")
    space = feature_spaces.open_space(name, own, inception=_INCEPTION.value) if name else None
    if space is None:
        print("note: --features=classifier or inception also measures the distance in features")
    out = Path(_OUT.value or found.home).expanduser()
    reconstructions.measure(found, real, section.split, space, out, size)


def measure_samples(source: sources.Source, out: Path) -> None:
    """Measures the samples of each row; finds what is wrong with flags, model or data before the first is drawn."""
    # The rows, and a table for each.
    config = source.trained.config
    tau = config.sample.tau if _TAU.value is None else _TAU.value
    names = options.split(own.stored("sampler", "samplers", _SAMPLERS.value, config.sample.sampler))
    names = [aliases.without_grid(name, say=True) for name in names]
    steps = sweep.numbers("steps", _STEPS.value, int) or None
    steps = samplers.chosen_steps(tau, steps, [students.default_steps(source.trained)])
    if _GUIDANCE.value is not None:
        _refuse(["guidance_scale"], "is one scale, and --guidance gives several")
    etas, scales = sweep.numbers("etas", _ETAS.value, float), sweep.numbers("guidance", _GUIDANCE.value, float)
    entries = sweep.plan(names, steps, etas, scales, samplings.words(flags.FLAGS))
    # What the samples are compared with, and by which figures.
    compared = _compared(source)
    name = _FEATURES.value or ("pixels" if compared.config.data.name == "digits" else "inception")
    metrics = features.plain_names(_METRICS.value, name)
    if features.ACCURACY in metrics and not isinstance(source.trained.model.conditions, Conditions):
        raise InputError("accuracy is of the class that was asked for, and this model has no classes; leave it out")
    if all(samplers.is_file(name) for name in names):
        _refuse(["steps", "tau"], "does nothing for tables in files, which have their own grid")
    planned = list(_samplings(source, entries, tau))
    real, split = _real_images(source)
    num = _NUM.value or len(real.images)
    settings = features.settings(metrics, len(real.images), num)
    space = feature_spaces.open_space(name, real, inception=_INCEPTION.value)
    with files.locked(out, "measuring into", ".evaluation.lock"):
        files.remove_temporaries(out, r"evaluation\.(json|csv|png)|guidance\.png", out)
        results = sweep.Results(out)
        reference = features.make_reference(space, real, datasets.cache_folder(), split=split)
        # Print the table; figures that the files have from an earlier start are not measured again.
        print(f"{source.title()}: {num:,} samples against {len(real.images):,} real images")
        _say_what_to_expect(space, reference, settings, metrics, num)
        shown = [figure for metric in metrics for figure in features.figure_names(metric, space.name)]
        width = max(32, *(len(entry.label()) for entry in entries))
        print(sweep.head(shown, width))
        facts = {"num": num, "features": space.key, "split": split, "data": data.fingerprint(real)}
        rows = []
        for entry, sampling in zip(entries, planned, strict=True):
            record = {**sampling.record(), "eta": entry.eta, **facts}
            known = results.figures(record)
            left = [metric for metric in metrics if not known.keys() >= {*features.figure_names(metric, space.name)}]
            if left:
                _measure(sampling, num, space, reference, left, results, record)
                known = results.figures(record)
            values = [known[figure] for figure in shown]
            rows.append(sweep.Row(entry, len(sampling.table.tau) - 1, sampling.table.nfe, values))
            print(rows[-1].line(width), flush=True)
    drawn = "evaluation.png" if _GUIDANCE.value is None else "guidance.png"
    sweep.plot(out / drawn, source.title(), rows, shown)
    print(f"wrote evaluation.csv, evaluation.json and {drawn} in {out}")


def _samplings(source, entries, tau):
    """Yields what draws the samples of each row."""
    for e in entries:
        asked = source if e.guidance is None else sources.at_scale(source, e.guidance)
        yield samplings.added(flags.FLAGS, samplings.make_sampling(asked, e.sampler, e.steps, tau, e.eta))


def _say_what_to_expect(space, reference, settings, metrics, num):
    """Prints, before a sample is drawn, what a reader of the figures should know of the space and of small sets."""
    if "accuracy" in space.facts:
        shares = [space.facts[name] for name in ("accuracy", "held_out_precision", "noise_precision")]
        print(
            "the classifier is right about {:.1%} of the images that it was not shown; their precision is {:.3f}, and "
            "that of uniform noise {:.3f}".format(*shares)
        )
    for doubt in space.facts.get("doubts", []):
        warnings.warn(doubt, stacklevel=2)
    few = features.too_few(reference, num) if "frechet" in metrics else ""
    for note in filter(None, [few, *settings.notes]):
        print(f"note: {note}")


def _measure(sampling, num, space, reference, metrics, results, record):
    """Draws the samples of a row, measures them, and writes down each figure as soon as it is known."""
    for note in sampling.notes():
        print(f"note: {note}")
    # Draw.
    mesh = devices.data_mesh()
    size = batching.size(flags.FLAGS.batch_size, sampling, mesh, num)
    start, batches = time.perf_counter(), []
    with tqdm(total=num, unit="image", desc=sampling.table.name, leave=False, disable=None) as progress:
        for images in sampling.draw(range(num), mesh, size):
            batches.append(images)
            progress.update(len(images))
    seconds = time.perf_counter() - start
    # Measure, and write down with how it went.
    found = space.extract(np.concatenate(batches))
    about = {"name": space.name, **space.facts}
    facts = {"seconds": round(seconds, 3), "versions": environment.versions(), "space": about}
    labels = sampling.source.labels
    asked = drawing.labels_of(range(num), labels) if labels else None
    for metric in metrics:
        results.add(record, features.measure(reference, found, [metric], asked), facts)


def _refuse(names, why):
    """Raises InputError for a flag that was given and would have no effect."""
    for name in names:
        if not flags.FLAGS[name].using_default_value:
            raise InputError(f"--{name} {why}; leave it out")


def _compared(source):
    """Returns the model as if it had been trained on what it is compared with."""
    return source.trained if _DATA.value is None else datasets.compared_with(source.trained, _DATA.value)


def _real_images(source):
    """Returns (data, split): what the run was trained on or --data names, or with --split another part of it."""
    trained = _compared(source)
    split = trained.config.data.split if _SPLIT.value is None else _SPLIT.value
    return datasets.load_data_of(trained, split), split


def _first_images(source):
    """Returns (data, split) as `_real_images` does; with --first only so many images."""
    real, split = _real_images(source)
    return _first(real), split


def _first(real):
    """Returns the data; with --first only so many images of it."""
    first = _FIRST.value
    if first is None:
        return real
    if first > len(real.images):
        raise InputError(f"--first={first} is more than the {len(real.images)} images of the data")
    labels = None if real.labels is None else real.labels[:first]
    return real._replace(images=real.images[np.arange(first)], labels=labels)


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
