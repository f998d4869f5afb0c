"""Measures a trained run: `python evaluate.py --steps=25`, or `python evaluate.py --bound=10,25`.

The first is for digits only: it draws as many samples as there are real images (or --num) and prints, beside what real
digits score, the Frechet distance on the pixels (not an FID) and how sure a classifier of real digits is of them. The
second prints the variational bound of the run's own data in bits per dimension, for each variance and number of steps.
They write evaluation.json and bound.json.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from diffusion import cli, devices, experiment, files, sampling_run
from diffusion.errors import InputError
from diffusion.evaluation import digits, likelihood

sampling_run.define_flags()
_NUM = flags.DEFINE_integer("num", None, "Number of samples. Default: as many as real images.", lower_bound=65)
_BOUND = flags.DEFINE_list("bound", None, "Numbers of steps: print the variational bound with so many, as 10,25.")
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: the run folder.")


def main() -> None:
    devices.prepare()
    run = sampling_run.open_run()
    out = Path(_OUT.value or run.folder.path)
    if _BOUND.value is None:
        measure_digits(run, out)
    else:
        measure_bound(run, out)


def measure_bound(run: sampling_run.SamplingRun, out: Path) -> None:
    """Bits per dimension of the data the run was trained on, with fixed and learned variances."""
    if not all(text.isdecimal() for text in _BOUND.value):
        raise InputError(f"bound is {','.join(_BOUND.value)!r}; write numbers of steps, as 10,25")
    data = experiment.load_data(run.trained.config.data)
    out.mkdir(parents=True, exist_ok=True)
    source = f"{run.folder.path}, step {run.trained.step:,}"
    print(f"{source}: variational bound of its {len(data.images):,} images on {run.tau}")
    key = jax.random.key(run.seed)
    rows = likelihood.bits_table(run.trained, data, key, steps=[int(text) for text in _BOUND.value], tau=run.tau)
    print(f"{'variance':10} {'steps':>5} {'bits per dimension':>19} {'standard error':>15}")
    for row in rows:
        print(f"{row.variance:10} {row.steps:5} {row.bits:19.4f} {row.standard_error:15.4f}")
    record = {"run": str(run.folder.path), "checkpoint_step": run.trained.step, "grid": run.tau, "seed": run.seed}
    files.write_json(out / "bound.json", {**record, "rows": [row._asdict() for row in rows]})
    print(f"wrote {out / 'bound.json'}")


def measure_digits(run: sampling_run.SamplingRun, out: Path) -> None:
    """How close samples come to real digits."""
    config = run.trained.config
    if config.data.name != "digits":
        raise InputError(f"{run.folder.path} was trained on {config.data.name!r}; only digits can be measured yet")
    real = experiment.load_data(config.data)
    num = _NUM.value or len(real.images)
    out.mkdir(parents=True, exist_ok=True)

    print(run.title(num))
    samples = np.concatenate(list(run.draw(range(num), devices.data_mesh(), flags.FLAGS.batch_size)))
    scores = {
        "samples": digits.score(samples, real),
        "real digits": digits.reference_scores(real),
    }
    print(f"{'':12} {'Frechet (pixels)':>17} {'mean top probability':>21}  share of each class, %")
    for name, s in scores.items():
        shares = " ".join(f"{100 * share:4.1f}" for share in s.class_shares)
        print(f"{name:12} {s.frechet:17.4f} {s.mean_top_probability:21.3f}  {shares}")
    print(
        "real digits: one random half against the other; probabilities of digits held out of the classifier's training"
    )
    record = {**run.record(), "num": num, "scores": {name: s._asdict() for name, s in scores.items()}}
    files.write_json(out / "evaluation.json", record)
    print(f"wrote {out / 'evaluation.json'}")


if __name__ == "__main__":
    cli.run(main)
