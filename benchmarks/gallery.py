"""Pictures of the model that ships: samplers at few steps from one set of latents, a sample on its way, and edits.

    python -m benchmarks.gallery [--out=docs/images]

Writes samplers.png, way.png and edits.png.
"""

import io
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.claims.report import new_figure, show_pictures
from diffusion import data, editing, pretrained, sample, solvers, timesteps
from diffusion.commands import cli
from diffusion.commands import samplers as by_name
from diffusion.files import write_atomically
from diffusion.images import to_floats

_OUT = flags.DEFINE_string("out", "docs/images", "Folder of the pictures.")

SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim", "DPM-Solver++(2M)": "dpm_solver_pp", "UniPC-3": "unipc"}
STEPS = (5, 10, 25)
LATENTS = 6
SHOWN = (0, 4, 8, 12, 16, 20, 22, 24)
"""Steps of 25 before which the way is shown."""

EDITED = 5
"""The number of the digit in the data that is edited."""

ENDS = (1, 3)
"""The samples between which the way goes."""

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def main() -> None:
    trained = pretrained.load("digits")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("samplers", samplers(trained)), ("way", way(trained)), ("edits", edits(trained))):
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


def edits(trained):
    """One digit noised to some strengths and drawn again, its lower half drawn anew, and a way between two samples."""
    model, key, count = trained.model, jax.random.key(0), len(STRENGTHS) + 1
    digit = to_floats(data.load("digits").images[EDITED : EDITED + 1])
    shared = {"prediction": model.prediction, "clip": trained.clip}

    def run(table, number, **options):
        images = sample(model.apply_fn, trained.params, table, key, number, model.image_shape, **shared, **options)
        return np.asarray(images)

    def variation(strength):
        tau = timesteps.uniform(model.schedule, 25, start=strength)
        return run(solvers.ddim(model.schedule, tau), 1, x_init=editing.noised(model.schedule, digit, tau[0], key))

    mask = np.zeros((8, 8, 1), np.float32)
    mask[:4] = 1
    stochastic = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 25), eta=1.0)
    filled = run(solvers.resampled(stochastic), count - 1, known=(digit[0], mask))
    ends = editing.start_noise(key, np.array(ENDS, np.uint32), model.image_shape)
    first, last = (np.broadcast_to(end, (count, *end.shape)) for end in np.asarray(ends))
    start = editing.slerp(first, last, np.linspace(0, 1, count, dtype=np.float32))
    between = run(solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 25)), count, x_init=start)
    rows = [
        np.concatenate([digit, *map(variation, STRENGTHS)]),
        np.concatenate([np.where(mask == 1, digit, 1.0), filled]),
        between,
    ]
    labels = ["picture", *(f"strength {strength:g}" for strength in STRENGTHS)]
    figure = new_figure(12, 4.4)
    show_pictures(figure.subplots(), np.stack(rows), labels, ["--init", "--mask", "--interpolate"])
    return figure


if __name__ == "__main__":
    cli.start(main, about=__doc__)
