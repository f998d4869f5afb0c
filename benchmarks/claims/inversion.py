"""An image can be rebuilt from its latent (DDIM, arXiv:2010.02502, section 5.4 and table 2)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.report import Findings, model_facts, new_figure
from diffusion import sample, schedules, solvers, timesteps
from diffusion.commands.datasets import load_data
from diffusion.images import to_floats
from diffusion.model import Trained

PUBLISHED = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Mean squared error per dimension of pixels in [0, 1], CIFAR-10's test set, rounded to 1e-4."""


def measure(
    name: str, trained: Trained, *, steps: Sequence[int] = tuple(PUBLISHED), num: int = 16, iterations=(1, 2, 3)
) -> Findings:
    """The error of images that went to noise and back, for each S and number of fixed-point iterations."""
    schedule = trained.model.schedule
    # Where the paper's schedule ends; one with less signal at T loses the image in its last step.
    ends = [s.half_log_snr(s.num_timesteps) for s in (schedules.linear(), schedule)]
    start = float(schedule.time_of(max(ends)))
    images = load_data(trained.config.data).images[:num]
    rows = []
    for count in steps:
        tau = timesteps.explicit(schedule, np.linspace(start, 0, count + 1))
        errors = [_error(trained, images, tau, k) for k in iterations]
        whole = _error(trained, images, timesteps.uniform(schedule, count), 1)
        rows.append((count, PUBLISHED.get(count), *errors, whole))

    columns = ["S", "published", *(f"ours, {k} call{'s' * (k > 1)} a step" for k in iterations), "1 call, from T"]
    figure = new_figure()
    axes = figure.subplots()
    axes.loglog(*zip(*PUBLISHED.items(), strict=True), "k--o", label="published, CIFAR-10, 1 call a step")
    for j in range(2, 2 + len(iterations)):
        axes.loglog(steps, [row[j] for row in rows], marker="s^Dv<>"[j % 6], label=columns[j])
    axes.set_xticks(list(steps), [str(count) for count in steps])
    axes.minorticks_off()
    axes.set(xlabel="steps S, each way", ylabel="squared error per pixel of [0, 1]")
    axes.set_title("Images to noise and back")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    facts = (
        f"{model_facts(name, trained)}; the first {num} images, pixels scaled to [0, 1], no clipping, float32; grids "
        f"evenly spaced from t = {start:.1f}, in the last column from T = {schedule.num_timesteps};"
    )
    return Findings(columns, rows, figure, facts)


def _error(trained, images, tau, iterations):
    """Mean squared error per dimension of pixels in [0, 1] after the way to tau[0] and back."""
    model = trained.model
    table = solvers.ddim(model.schedule, tau)
    x, key = jnp.asarray(to_floats(images)), jax.random.key(0)
    shared = {"prediction": model.prediction, "clip": "none"}
    back = x
    for one in (table.reverse(iterations), table):
        back = sample(model.apply_fn, trained.params, one, key, len(x), model.image_shape, x_init=back, **shared)
    return float(np.mean((np.asarray(back, np.float64) - np.asarray(x)) ** 2) / 4)
