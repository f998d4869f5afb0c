"""Between two latents lie pictures of the same kind (DDIM, arXiv:2010.02502, section 5.3, figure 6 and Eq. 67)."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure, show_pictures
from diffusion import editing, sample, solvers, timesteps
from diffusion.commands.datasets import load_data
from diffusion.images import to_floats
from diffusion.model import Trained

WAYS = {
    "slerp of latents": editing.slerp,
    "straight line of latents": lambda a, b, weight: a + weight[:, None, None, None] * (b - a),
    "cross-fade of pixels": None,
}
FINE = 4
"""How many times as many points stand on the fine path."""


def measure(
    name: str, trained: Trained, *, steps: int = 50, pairs: int = 32, points: int = 9, shown: int = 2
) -> Findings:
    """Norms, gaps between neighbours, and distances to real images, for three ways between pairs of latents."""
    shape = trained.model.image_shape
    a, b = jnp.split(jax.random.normal(jax.random.key(0), (2 * pairs, *shape)), 2)
    weights = np.linspace(0, 1, FINE * (points - 1) + 1)
    real = to_floats(load_data(trained.config.data).images)
    first, last = _pictures(trained, a, steps), _pictures(trained, b, steps)
    rows, paths, middle = [], {}, len(weights) // 2
    for way, between in WAYS.items():
        if between is None:
            path, norm = np.stack([first + w * (last - first) for w in weights], axis=1), None
        else:
            latents = [between(a, b, jnp.full(pairs, w)) for w in weights]
            path = np.stack([_pictures(trained, x, steps) for x in latents], axis=1)
            norm = float(jnp.sqrt(jnp.mean(latents[middle] ** 2)))
        gaps = [_largest_gap(path[:, ::stride]) for stride in (FINE, 1)]
        contrast = float(path[:, middle].std(axis=(1, 2, 3)).mean() / path[:, [0, -1]].std(axis=(2, 3, 4)).mean())
        nearest = [_nearest(path[:, i].reshape(-1, *shape), real) for i in ([0, -1], middle)]
        rows.append((way, norm, contrast, *nearest, *gaps))
        paths[way] = path[:, ::FINE]

    fine = FINE * (points - 1) + 1
    columns = ["way", "latent's RMS in the middle", "contrast, middle / ends", "to nearest real image, ends"]
    columns += ["same, middle", f"largest gap, {points} points", f"largest gap, {fine} points"]
    figure = new_figure(8.5, 0.6 + 0.65 * len(WAYS) * shown)
    pictures = np.stack([paths[way][i] for i in range(shown) for way in WAYS])
    labels = [f"pair {i}: {way}" for i in range(shown) for way in WAYS]
    ticks = [f"{w:g}" for w in weights[::FINE]]
    show_pictures(figure.subplots(), pictures, ticks, labels, "weight of the second latent")
    facts = (
        f"{model_facts(name, trained)}; {pairs} pairs of latents of seed 0, DDIM with S = {steps}; distances are RMS "
        "per pixel of [-1, 1], gaps lie between neighbours on a path;"
    )
    return Findings(columns, rows, figure, facts)


def _pictures(trained, latents, steps):
    """What DDIM makes of latents."""
    model = trained.model
    table = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, steps))
    options = {"prediction": model.prediction, "clip": trained.clip, "x_init": latents}
    key = jax.random.key(0)  # of no effect: nothing is random but the latents
    return np.asarray(sample(model.apply_fn, trained.params, table, key, len(latents), model.image_shape, **options))


def _largest_gap(path):
    """Mean over the paths of the largest RMS distance between neighbours; path is [pairs, points, H, W, C]."""
    return float(np.sqrt(np.mean(np.diff(path, axis=1) ** 2, axis=(2, 3, 4))).max(axis=1).mean())


def _nearest(images, real):
    """Mean RMS distance of each image to the real one nearest to it."""
    images, real = images.reshape(len(images), -1), real.reshape(len(real), -1)
    return float(np.mean([np.sqrt(np.mean((real - image) ** 2, axis=1)).min() for image in images]))
