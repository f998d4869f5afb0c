"""The same latent gives the same picture at any number of steps (DDIM, arXiv:2010.02502, section 5.2 and figure 5)."""

from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure, show_pictures
from diffusion import sample, solvers, timesteps
from diffusion.model import Trained

SAMPLERS = {"DDIM": solvers.ddim, "DDPM": solvers.ddpm}


def measure(
    name: str, trained: Trained, *, steps: Sequence[int] = (5, 10, 25, 100, 1000), num: int = 64, shown: int = 6
) -> Findings:
    """RMS distances of the pictures of num latents to those that the largest number of steps makes of them."""
    pictures = {
        sampler: np.stack([_pictures(trained, solver, count, num) for count in steps], axis=1)
        for sampler, solver in SAMPLERS.items()
    }
    last, rows = steps[-1], []
    for i, count in enumerate(steps[:-1]):
        distances = [_distances(drawn[:, i], drawn[:, -1]) for drawn in pictures.values()]
        rms = [float(np.sqrt(np.mean(np.diag(d) ** 2))) for d in distances]
        own = [float(np.mean(d.argmin(axis=1) == np.arange(num))) for d in distances]
        rows.append((f"S = {count}", rms[0], own[0], rms[1], own[1]))
    others = [_distances(drawn[:, -1], drawn[:, -1])[~np.eye(num, dtype=bool)] for drawn in pictures.values()]
    rms = [float(np.sqrt(np.mean(d**2))) for d in others]
    rows.append((f"other latents, S = {last}", rms[0], None, rms[1], None))

    columns = ["pictures", *(f"{s} {what}" for s in SAMPLERS for what in (f"RMS to S = {last}", "own is nearest"))]
    figure = new_figure(9, 0.8 + 0.75 * shown)
    figure.get_layout_engine().set(wspace=0.06)
    for axes, (sampler, drawn) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        labels = [f"latent {i}" for i in range(shown)] if sampler == "DDIM" else [""] * shown
        show_pictures(axes, drawn[:shown], [f"S = {count}" for count in steps], labels, sampler)
        axes.tick_params(axis="x", labelsize="small")
    facts = f"{model_facts(name, trained)}; {num} latents of seed 0, uniform grid, RMS per pixel of [-1, 1];"
    return Findings(columns, rows, figure, facts)


def _pictures(trained, solver, count, num):
    """[num, H, W, C]; picture i begins at the same latent whatever the table."""
    model, clip = trained.model, trained.clip
    table = solver(model.schedule, timesteps.uniform(model.schedule, count))
    options = {"prediction": model.prediction, "clip": clip}
    key = jax.random.key(0)
    return np.asarray(sample(model.apply_fn, trained.params, table, key, num, model.image_shape, **options))


def _distances(a, b):
    """RMS per pixel of each of a [N, ...] to each of b [M, ...]: [N, M]."""
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    return np.sqrt(np.mean((a[:, None] - b[None]) ** 2, axis=-1))
