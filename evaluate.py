"""Measures a trained model: `python evaluate.py --samplers=ddim,ddpm --steps=5,10,25 --etas=0,1`.

Draws as many samples as there are real images (or --num) with every sampler, number of steps and eta, and compares them
with the real ones in a space of features: pixels, a classifier trained on the data, or Inception, whose distance alone
is called FID. Writes evaluation.csv, evaluation.json (everything needed to repeat a row) and evaluation.png; the same
command goes on where it was stopped.

`python evaluate.py --bound=10,25` prints the variational bound of the data in bits per dimension instead, for each
variance and number of steps, and writes bound.json with the part of every step. `--likelihood=25,50` prints its
likelihood under the probability flow, solved in so many steps, and writes likelihood.json.
"""

import time
from pathlib import Path

import jax
import numpy as np
import pooch
from absl import flags

from diffusion import __version__, cli, data, devices, experiment, files, plots, sampling_run
from diffusion.errors import InputError, nearest
from diffusion.evaluation import features, flow_likelihood, likelihood, sweep

SPACES = ("classifier", "inception", "pixels")

sampling_run.define_source_flags()
_SAMPLERS = flags.DEFINE_string("samplers", None, "As sample.py's --sampler, several with commas. Default: the run's.")
_STEPS = flags.DEFINE_list("steps", None, "Numbers of steps, as 5,10,25. Default: the run's config.sample.steps (25).")
_ETAS = flags.DEFINE_list("etas", [], "Values for the samplers that have an eta, as 0,1. Default: the sampler's own.")
_TAU = flags.DEFINE_string("tau", None, "Timesteps to visit, as sample.py's --tau. Default: config.sample.tau.")
_FEATURES = flags.DEFINE_string("features", None, "pixels, classifier or inception. Default: pixels for digits.")
_METRICS = flags.DEFINE_list(
    "metrics",
    ["frechet", "prdc"],
    "frechet, kernel, score, prdc; in Inception's space the first three are fid, kid, is.",
)
_INCEPTION = flags.DEFINE_string("inception", None, "File of the standard Inception weights. Default: downloaded.")
_NUM = flags.DEFINE_integer("num", None, "Number of samples. Default: as many as real images.", lower_bound=65)
_FIRST = flags.DEFINE_integer("first", None, "Only so many images for --bound and --likelihood.", lower_bound=1)
_BOUND = flags.DEFINE_list("bound", None, "Numbers of steps: print the variational bound with so many, as 10,25.")
_LIKELIHOOD = flags.DEFINE_list(
    "likelihood", None, "Numbers of steps: print the likelihood under the probability flow with so many, as 25,50."
)
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: the run folder.")


def main() -> None:
    devices.prepare()
    source = sampling_run.open_source()
    out = Path(_OUT.value or source.home)
    if _BOUND.value is None and _LIKELIHOOD.value is None:
        measure_samples(source, out)
    if _BOUND.value is not None:
        measure_bound(source, out)
    if _LIKELIHOOD.value is not None:
        measure_likelihood(source, out)


def measure_samples(source: sampling_run.Source, out: Path) -> None:
    """The sweep: finds all that can be wrong before the first image is drawn."""
    config = source.trained.config
    tau = _TAU.value or config.sample.tau
    samplers = sweep.parse_samplers(_SAMPLERS.value or config.sample.sampler)
    steps = [config.sample.steps] if _STEPS.value is None else _numbers("steps", _STEPS.value, int)
    entries = sweep.plan(samplers, steps, _numbers("etas", _ETAS.value, float))
    runs = [sampling_run.make_run(source, entry.sampler, entry.steps, tau, entry.eta) for entry in entries]
    real = experiment.load_data(config.data)
    num = _NUM.value or len(real.images)
    name = _FEATURES.value or ("pixels" if config.data.name == "digits" else "inception")
    metrics = features.plain_names(_METRICS.value, name)
    space = _space(name, real)
    out.mkdir(parents=True, exist_ok=True)
    results = sweep.Results(out)
    reference = features.make_reference(space, real, _cache(), split=config.data.split)

    print(f"{_of(source)}: {num:,} samples against {len(real.images):,} real images")
    for fact, value in space.facts.items():
        print(f"{name} {fact}: {value}")
    shown, printed = [], False
    for entry, run in zip(entries, runs, strict=True):
        record = {**run.record(), "eta": entry.eta, "num": num, "features": space.key, "data": data.fingerprint(real)}
        row = results.find(record, metrics)
        if row is None:
            start = time.perf_counter()
            samples = np.concatenate(list(run.draw(range(num), devices.data_mesh(), flags.FLAGS.batch_size)))
            seconds = time.perf_counter() - start
            found = space.extract(samples)
            if note := features.too_few(reference, found):
                print(f"note: {note}")
            values = features.measure(reference, found, metrics)
            versions = {"diffusion": __version__, "jax": jax.__version__, "numpy": np.__version__}
            row = results.add(record, metrics, values, {"seconds": round(seconds, 3), "versions": versions})
        if not printed:
            print(f"{'sampler':32} {'steps':>5} {'calls':>5} " + " ".join(f"{name:>18}" for name in row["metrics"]))
            printed = True
        print(_line(entry, run, row), flush=True)
        shown.append((entry, run, row))
    _plot(out, source, shown)
    print(f"wrote evaluation.csv, evaluation.json and evaluation.png in {out}")


def measure_bound(source: sampling_run.Source, out: Path) -> None:
    """Bits per dimension of the data the run was trained on, with fixed and learned variances."""
    steps = _numbers("bound", _BOUND.value, int)
    images, key = _first_images(source), jax.random.key(source.seed)
    tau = _TAU.value or source.trained.config.sample.tau
    print(f"{_of(source)}: variational bound of {len(images.images):,} images of its data on {tau}")
    rows = likelihood.bits_table(source.trained, images, key, steps=steps, tau=tau)
    print(f"{'variance':10} {'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for row in rows:
        print(f"{row.variance:10} {row.steps:5} {row.bits:19.4f} {row.standard_error:15.4f}")
    _write_bits(source, out / "bound.json", images, rows, grid=tau)


def measure_likelihood(source: sampling_run.Source, out: Path) -> None:
    """Bits per dimension of the data the run was trained on, under the flow that DDIM discretizes."""
    steps = _numbers("likelihood", _LIKELIHOOD.value, int)
    images, key = _first_images(source), jax.random.key(source.seed)
    print(f"{_of(source)}: likelihood of {len(images.images):,} images of its data under the probability flow")
    rows = flow_likelihood.bits_table(source.trained, images, key, steps=steps)
    print(f"{'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for row in rows:
        print(f"{row.steps:5} {row.bits:19.4f} {row.standard_error:15.4f}")
    _write_bits(source, out / "likelihood.json", images, rows)


def _of(source):
    return f"{source.name}, step {source.trained.step:,}"


def _first_images(source):
    """The data the run was trained on, or the first images of it."""
    real, first = experiment.load_data(source.trained.config.data), _FIRST.value
    if first is None:
        return real
    if first > len(real.images):
        raise InputError(f"--first={first} is more than the {len(real.images)} images of the data")
    labels = None if real.labels is None else real.labels[:first]
    return real._replace(images=real.images[np.arange(first)], labels=labels)


def _write_bits(source, path, images, rows, **facts):
    trained = source.trained
    record = {"run": source.name, "checkpoint_step": trained.step, "ema": trained.ema, "seed": source.seed}
    record |= {"num": len(images.images), **facts, "rows": [row._asdict() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record)
    print(f"wrote {path}")


def _space(name, real):
    """The space of features of that name."""
    if name not in SPACES:
        raise InputError(f"features is {name!r}; {nearest(name, SPACES)}")
    if _INCEPTION.value and name != "inception":
        raise InputError(f"--inception goes with --features=inception, not {name}")
    if name == "inception":
        return features.inception(_INCEPTION.value)
    return features.classifier(real, _cache()) if name == "classifier" else features.pixels()


def _cache():
    """Where statistics of real sets and classifiers are kept, for all runs of this user."""
    return Path(pooch.os_cache("diffusion"), "evaluation")


def _numbers(flag, texts, kind):
    try:
        return [kind(text) for text in texts]
    except ValueError:
        example = "5,10,25" if kind is int else "0,0.5,1"
        raise InputError(f"{flag} is {','.join(texts)!r}; write numbers as {example}") from None


def _line(entry, run, row):
    values = " ".join(f"{value:18.4f}" for value in row["metrics"].values())
    return f"{entry.label():32} {entry.steps:5} {run.table.nfe:5} {values}"


def _plot(out, source, shown):
    """The first metric against network calls, a curve for each sampler."""
    metric = next(iter(shown[0][2]["metrics"]))
    series: dict[str, list[tuple[float, float]]] = {}
    for entry, run, row in shown:
        series.setdefault(entry.label(), []).append((run.table.nfe, row["metrics"][metric]))
    plots.curves(out / "evaluation.png", series, xlabel="network calls", ylabel=metric, title=_of(source))


if __name__ == "__main__":
    cli.run(main)
