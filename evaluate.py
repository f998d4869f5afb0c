"""Measures a trained run: `python evaluate.py --steps=25`. Digits only for now.

Draws as many samples as there are real images (or --num) and prints, beside what real digits score, the Frechet
distance on the pixels (not an FID) and how sure a classifier of real digits is of them. Writes evaluation.json.
"""

from pathlib import Path

import numpy as np
from absl import flags

from diffusion import cli, devices, experiment, files, sampling_run
from diffusion.errors import InputError
from diffusion.evaluation import digits

sampling_run.define_flags()
_NUM = flags.DEFINE_integer("num", None, "Number of samples. Default: as many as real images.", lower_bound=65)
_OUT = flags.DEFINE_string("out", None, "Output folder. Default: the run folder.")


def main() -> None:
    devices.prepare()
    run = sampling_run.open_run()
    config = run.trained.config
    if config.data.name != "digits":
        raise InputError(f"{run.folder.path} was trained on {config.data.name!r}; only digits can be measured yet")
    real = experiment.load_data(config.data)
    num = _NUM.value or len(real.images)
    out = Path(_OUT.value or run.folder.path)
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
