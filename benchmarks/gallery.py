"""Pictures of the model that ships: samplers at few steps from one set of latents, and a sample on its way from noise.

    python -m benchmarks.gallery [--out=docs/images]

Writes samplers.png and way.png.
"""

import io
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.claims.report import new_figure, show_pictures
from diffusion import pretrained, sample
from diffusion.commands import cli
from diffusion.commands import samplers as by_name
from diffusion.files import write_atomically

_OUT = flags.DEFINE_string("out", "docs/images", "Folder of the pictures.")

SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++(2M)": "dpm_solver_pp", "UniPC-3": "unipc"}
STEPS = (5, 10, 25)
LATENTS = 6
SHOWN = (0, 4, 8, 12, 16, 20, 22, 24)
"""Steps of 25 before which the way is shown."""


def main() -> None:
    trained = pretrained.load("digits")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("samplers", samplers(trained)), ("way", way(trained))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        write_atomically(out / f"{name}.png", buffer.getvalue())
        print(f"wrote {out / name}.png")


def draw(trained, sampler, steps, **options):
    """The samples of LATENTS starts, the same for every sampler and number of steps."""
    model = trained.model
    table = by_name.make_table(model.schedule, sampler, steps, "uniform")
    options |= {"prediction": model.prediction, "clip": trained.clip}
    shape = model.image_shape
    return sample(model.apply_fn, trained.params, table, jax.random.key(0), LATENTS, shape, **options)


def samplers(trained):
    """A row for each sampler, a block of columns for each number of steps."""
    figure = new_figure(12, 3.2)
    figure.get_layout_engine().set(wspace=0.05)
    for axes, steps in zip(figure.subplots(1, len(STEPS)), STEPS, strict=True):
        pictures = np.stack([draw(trained, name, steps) for name in SAMPLERS.values()])
        labels = list(SAMPLERS) if steps == STEPS[0] else [""] * len(SAMPLERS)
        show_pictures(axes, pictures, [""] * LATENTS, labels, f"{steps} network calls")
    return figure


def way(trained):
    """What the network sees and what it makes of it, before some of 25 steps of DDIM, and the sample."""
    images, passed = draw(trained, "ddim", STEPS[-1], return_trajectory=True)
    pictures = np.stack([np.asarray(path)[list(SHOWN), 1] for path in (passed.x, passed.x0)])
    last = np.stack([np.asarray(images[1])] * 2)[:, None]
    tau = by_name.make_tau(trained.model.schedule, "uniform", STEPS[-1])
    labels = [f"t = {tau[i]:g}" for i in SHOWN] + ["sample"]
    figure = new_figure(12, 3)
    show_pictures(figure.subplots(), np.concatenate([pictures, last], axis=1), labels, ["x", "estimate of x_0"])
    return figure


if __name__ == "__main__":
    cli.start(main, about=__doc__)
