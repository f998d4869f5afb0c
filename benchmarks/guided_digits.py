"""What guidance does to digits: the same latents and classes at several scales, as a picture and in figures.

    python train.py --config=configs/digits_classes.py
    python -m benchmarks.guided_digits [--workdir=runs/digits_classes] [--out=docs/images/guidance.png]

Prints for each scale which share of 1,000 samples a classifier of real digits takes for the class that was asked for,
and how far the samples of a class lie from their mean, where real digits have 1.
"""

import io

import numpy as np
from absl import flags
from sklearn.svm import SVC

from benchmarks.claims.report import new_figure, show_pictures
from diffusion import devices, solvers, timesteps
from diffusion.commands import cli, drawing
from diffusion.data import digits
from diffusion.files import write_atomically
from diffusion.guidance import Guidance
from diffusion.images import to_floats
from diffusion.training import run_folder

_WORKDIR = flags.DEFINE_string("workdir", "runs/digits_classes", "A run with the digits' classes.")
_OUT = flags.DEFINE_string("out", "docs/images/guidance.png", "The picture.")

SCALES = (1.0, 2.0, 4.0)
CLASSES, ROWS, COUNT = 10, 4, 1000


def main() -> None:
    trained = run_folder.load_trained(run_folder.existing(_WORKDIR.value))
    model, params = trained.model, trained.params
    table = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 25))
    shared = {"seed": 0, "mesh": devices.data_mesh(), "labels": range(CLASSES), "batch_size": 100, "clip": trained.clip}
    drawn = {}
    for scale in SCALES:
        options = {**shared, "guidance": Guidance(scale=scale)}
        drawn[scale] = np.concatenate(list(drawing.generate(model, params, table, range(COUNT), **options)))
    # The figures; in five-fold cross-validation this classifier is right about 97 % of the digits.
    real = digits.load()
    classifier = SVC(gamma=1e-3).fit(flat(real.images), real.labels)
    asked = np.arange(COUNT) % CLASSES
    print(f"{'scale':>6} {'recognised':>11} {'spread':>7}")
    for scale, images in drawn.items():
        right = np.mean(classifier.predict(flat(images)) == asked)
        print(f"{scale:6g} {right:11.1%} {spread(images, asked) / spread(real.images, real.labels):7.2f}")
    # The picture: a panel for each scale, a column for each class.
    figure = new_figure(12, 2.4)
    for axes, (scale, images) in zip(figure.subplots(1, len(SCALES)), drawn.items(), strict=True):
        pictures = to_floats(images[: ROWS * CLASSES]).reshape(ROWS, CLASSES, *images.shape[1:])
        show_pictures(axes, pictures, range(CLASSES), [""] * ROWS, f"guidance scale {scale:g}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    write_atomically(_OUT.value, buffer.getvalue())
    print(f"wrote {_OUT.value}")


def flat(images):
    """Pixels in 0..16, as scikit-learn has its digits, [N, pixels]."""
    return images.reshape(len(images), -1) / 255 * 16


def spread(images, labels):
    """The root mean square distance of a pixel from the mean of its class."""
    values = flat(images)
    return np.sqrt(np.mean([np.var(values[labels == label], axis=0).mean() for label in range(CLASSES)]))


if __name__ == "__main__":
    cli.start(main, about=__doc__)
