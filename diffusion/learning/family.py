"""A family of samplers: what a learner may change of a hand-made solver, as one vector of numbers.

All zeros are the hand-made solver on the grid that the family starts from. The numbers move

    grid     the times tau, through the logarithms of its S + 1 increments,
    times    the times told to the network, while signal and noise stay those of tau (LD3, arXiv:2405.15506),
    history  the weight of each earlier D against the newest one's (as S4S, arXiv:2502.17423),
    sums     the sum of the weights of a step, and what it keeps of x,
    last     both of these in the last step, which makes the sample,

and the solver is built anew at the present tau, so that its theory stays in (as GS, arXiv:2510.17699). The change of a
step's weights is in units of W_i = a_s - (n_s / n_t) a_t, the weight of D in the DDIM step.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable
from diffusion.solvers.history import History, from_table

GROUPS = ("grid", "times", "history", "sums", "last")

SCOPES = {"all": GROUPS, "tau": ("grid", "times"), "coefficients": ("history", "sums", "last")}
"""What is learned, by name: everything (GS), the times only (LD3), or the coefficients on a fixed grid (S4S)."""

TIME_UNIT = 0.1
"""A number 1 of the group "times" moves the time told to the network by this share of tau."""

MIN_SHARE = 2e-4
"""The increment, as a share of T, that a grid which starts at T is taken to have above its start."""

Vector = Float[np.ndarray, "P"]


class Family(NamedTuple):
    """A family of samplers around a hand-made one.

    Attributes:
      schedule: the noise schedule.
      solver: (schedule, tau, options) -> table, of one network call a step.
      tau: the grid of the hand-made one.
      options: of the solver.
      groups: which of `GROUPS` are free.
    """

    schedule: NoiseSchedule
    solver: Callable[..., SamplerTable]
    tau: Float[np.ndarray, "S+1"]
    options: Mapping[str, Any] = MappingProxyType({})
    groups: tuple[str, ...] = GROUPS

    @property
    def num_steps(self) -> int:
        """Returns S, the number of steps and of network calls."""
        return len(self.tau) - 1

    @property
    def sizes(self) -> dict[str, int]:
        """Counts the numbers of each group that is free."""
        steps = self.num_steps
        sizes = {"grid": steps + 1, "times": steps}
        sizes |= {"history": (steps - 1) * (steps - 2) // 2, "sums": 2 * (steps - 1), "last": steps + 1}
        return {group: size for group, size in sizes.items() if group in self.groups}

    @property
    def size(self) -> int:
        """Counts the numbers."""
        return sum(self.sizes.values())

    def corrections(self) -> Float[np.ndarray, "P"]:
        """Returns 1 for the numbers that correct a solver, which are kept small, and 0 for those that move its grid."""
        return np.concatenate([np.full(size, float(group != "grid")) for group, size in self.sizes.items()])

    def history(self, numbers: Vector) -> History:
        """Returns the sampler of these numbers.

        Raises:
          InputError: the solver cannot take the grid.
        """
        steps, parts = self.num_steps, self._parts(np.asarray(numbers, np.float64))
        tau = self._grid(parts["grid"])
        base = from_table(self.solver(self.schedule, tau, **self.options))
        if base.nfe != steps:
            raise InputError(f"the solver makes {base.nfe} network calls in {steps} steps; learn from one of one call")
        signal, noise = self.schedule.at(tau)
        unit = signal[1:] - noise[1:] / noise[:-1] * signal[:-1]
        # What a step adds to the weights of the earlier D it takes from the newest, so that a constant D is kept.
        of_last, sums = np.split(parts["last"], [steps - 1])
        earlier, last = parts["sums"].reshape(2, steps - 1), sums[:, None]
        totals, kept = np.concatenate([earlier, last], axis=1)
        change = np.zeros((steps, steps))
        change[np.tril_indices(steps, -1)] = np.concatenate([parts["history"], of_last])
        change[np.diag_indices(steps)] = totals - change.sum(axis=1)
        return base._replace(
            t=np.minimum(base.t * (1 + TIME_UNIT * parts["times"]), self.schedule.num_timesteps),
            keep=base.keep + unit * kept,
            weights=base.weights + unit[:, None] * change,
        )

    def derivative(self, numbers: Vector, width: float = 1e-5) -> History:
        """Returns the derivatives of all arrays by each number, along a first axis of length P.

        Central differences in float64: their error, about 1e-10, is far below that of the network in float32.
        """
        columns = []
        for direction in np.eye(self.size):
            ends = [self.history(numbers + way * width * direction) for way in (1, -1)]
            columns.append([(high - low) / (2 * width) for high, low in zip(*ends, strict=True)])
        return History(*(np.stack(parts) for parts in zip(*columns, strict=True)))

    def _parts(self, numbers):
        """Splits the vector into its groups; those that are not free are 0."""
        parts, begin = {}, 0
        for group, size in self._replace(groups=GROUPS).sizes.items():
            free = group in self.groups
            parts[group] = numbers[begin : begin + size] if free else np.zeros(size)
            begin += size * free
        return parts

    def _grid(self, numbers):
        """Moves the grid: its increments are multiplied by exp(numbers), and scaled to add up to T again."""
        latest = self.schedule.num_timesteps
        increments = np.maximum(-np.diff([latest, *self.tau]) / latest, MIN_SHARE)

        def grid(increments):
            return latest * (np.cumsum(increments[::-1])[::-1] / increments.sum())[1:]

        # As a difference, because only so no numbers give the very grid of the start.
        moved = self.tau[:-1] + (grid(increments * np.exp(numbers)) - grid(increments))
        return np.append(np.minimum(moved, latest), 0.0)
