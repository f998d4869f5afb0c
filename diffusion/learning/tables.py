"""Learns a sampler of a few network calls for a trained model: a least-squares problem of 10 to 90 numbers.

The samples of a table are compared with those of a teacher, a hand-made solver with many calls, from the same noise.
The search begins at the best hand-made solvers and grids, tries a few iterations from each, and goes on from the best.
What is kept is always what is best on noise that is not learned from. One step of the search is a pure function of its
state, so that a search which was cut off goes on from the last iteration.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError
from diffusion.learning import least_squares, rollout, starts
from diffusion.learning.family import Family
from diffusion.learning.least_squares import Fit
from diffusion.learning.losses import LOG, Errors, Loss
from diffusion.learning.rollout import Asked, Noises
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.history import History
from diffusion.types import Images

TRIALS, PER_TRIAL, BEHIND = 3, 2, 0.3
"""From how many hand-made samplers the search begins, how many iterations each gets before the best goes on, and by how
much its loss may be behind the best one's after the first of them."""

PATIENCE, WORTHWHILE = 2, 0.002
"""The search ends after so many iterations in a row that lower the held-out loss by less than this."""

MAX_ITERATIONS = 40

USUAL = 12
"""The number of iterations that a search makes from its best start, roughly; only for the time left."""

MAX_CALLS = 50
"""The most calls of a table that is learned; with more, hand-made solvers are as good as their many steps."""


class Bed(NamedTuple):
    """What a table is learned on.

    Attributes:
      asked: the network.
      schedule: its noise schedule.
      train, held: noises to learn from, and others to judge by, in batches of one size.
      train_targets, held_targets: what the teacher makes of them, batch by batch.
      compared: what is compared of samples, and how much an error counts.
    """

    asked: Asked
    schedule: NoiseSchedule
    train: tuple[Noises, ...]
    held: tuple[Noises, ...]
    train_targets: tuple[Images, ...]
    held_targets: tuple[Images, ...]
    compared: Loss = LOG

    @property
    def count(self) -> int:
        """Counts the noises to learn from."""
        return sum(len(part.x) for part in self.train)

    def loss(self, errors: Errors) -> float:
        """Returns the logarithm of the typical error, by which samplers are judged."""
        return self.compared.typical(errors)

    def errors(self, history: History, held: bool) -> Errors:
        """Returns the error of each sample beside the teacher's."""
        noises, targets = (self.held, self.held_targets) if held else (self.train, self.train_targets)
        parts = [
            _errors(self.compared, rollout.run(self.asked, history, part), target)
            for part, target in zip(noises, targets, strict=True)
        ]
        return np.concatenate([np.asarray(part, np.float64) for part in parts])


class Trial(NamedTuple):
    """Where the search stands that began at one hand-made sampler.

    Attributes:
      start: the sampler's name, as "unipc:order=2", and its grid, as "uniform:start=0.985".
      fit: the least-squares fit.
      best, best_loss: the numbers with the lowest held-out loss so far, and that loss.
      losses: (training loss, held-out loss) at the start and after each iteration.
      stalled: how many iterations in a row have brought little.
    """

    start: tuple[str, str]
    fit: Fit
    best: Float[np.ndarray, "P"]
    best_loss: float
    losses: tuple[tuple[float, float], ...]
    stalled: int = 0

    @property
    def iterations(self) -> int:
        """Counts the iterations made."""
        return len(self.losses) - 1

    @property
    def finished(self) -> bool:
        """Whether further iterations are of no use."""
        return self.stalled >= PATIENCE or self.fit.gain == 0 or self.iterations >= MAX_ITERATIONS


class Search(NamedTuple):
    """Where the search for a table stands.

    Attributes:
      calls: how many network calls the table makes.
      groups: what is free, see `family.SCOPES`.
      hand_made: the held-out loss of the best hand-made sampler.
      trials: the best hand-made one first.
    """

    calls: int
    groups: tuple[str, ...]
    hand_made: float
    trials: tuple[Trial, ...]

    @property
    def iterations(self) -> int:
        """Counts the iterations made, from all starts."""
        return sum(trial.iterations for trial in self.trials)

    @property
    def leader(self) -> Trial:
        """Returns the trial with the lowest held-out loss."""
        return min(self.trials, key=lambda trial: trial.best_loss)

    @property
    def current(self) -> int | None:
        """Returns the number of the trial that the next iteration is for, or None at the end of the search."""
        for number, trial in enumerate(self.trials):
            hopeful = trial.iterations == 0 or trial.best_loss < self.leader.best_loss + BEHIND
            if trial.iterations < PER_TRIAL and hopeful and not trial.finished:
                return number
        number = self.trials.index(self.leader)
        return None if self.leader.finished else number


def make_bed(
    asked: Asked,
    schedule: NoiseSchedule,
    teacher: History,
    train: tuple[Noises, ...],
    held: tuple[Noises, ...],
    compared: Loss = LOG,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Bed:
    """Has the teacher draw what a table is learned from.

    Args:
      asked, schedule: the network.
      teacher: a sampler of many calls.
      train, held: the noises, in batches.
      compared: see `Bed`.
      tick: is called after each batch.

    Raises:
      InputError: the teacher's samples are not finite.
    """
    targets = []
    for part in (*train, *held):
        targets.append(rollout.run(asked, teacher, part))
        if not np.isfinite(np.asarray(targets[-1])).all():
            raise InputError("the teacher's samples are not finite: the weights diverged; take another checkpoint")
        tick()
    return Bed(asked, schedule, train, held, tuple(targets[: len(train)]), tuple(targets[len(train) :]), compared)


def begin(
    bed: Bed,
    calls: int,
    groups: tuple[str, ...],
    tick: Callable[[], None] = lambda: None,
    among: Iterable[tuple[str, str, History]] | None = None,
) -> Search:
    """Ranks the hand-made samplers on held-out noise and returns the search that starts from the best of them.

    Args:
      bed: what is learned on.
      calls: network calls of the table.
      groups: what is free.
      tick: is called after each sampler.
      among: the hand-made samplers to choose from, as `starts.hand_made` yields them; None takes its own.

    Raises:
      InputError: no hand-made sampler of so many calls works.
    """
    ranked = []
    for base, grid, history in among or starts.hand_made(bed.schedule, calls):
        with contextlib.suppress(InputError):  # the interval of guidance holds none of its times
            ranked.append((bed.loss(bed.errors(history, held=True)), base, grid))
        tick()
    ranked = sorted(entry for entry in ranked if np.isfinite(entry[0]))
    if not ranked:
        raise InputError(f"no solver of {calls} calls gives finite samples with this model; take more calls")
    # The best ones, each with another solver or another kind of grid.
    chosen: dict[tuple[str, str], tuple[float, str, str]] = {}
    for entry in ranked:
        chosen.setdefault((entry[1].partition(":")[0], entry[2].partition(":")[0]), entry)
    trials = []
    for held_loss, base, grid in list(chosen.values())[:TRIALS]:
        family = family_of(bed, calls, groups, (base, grid))
        zeros = np.zeros(family.size)
        fit = least_squares.begin(_problem(bed, family), zeros)
        trials.append(Trial((base, grid), fit, zeros, held_loss, ((bed.loss(fit.errors), held_loss),)))
    return Search(calls, groups, ranked[0][0], tuple(trials))


def advance(bed: Bed, search: Search) -> Search:
    """Makes the next iteration of a search that is not at its end."""
    number = search.current
    trial = search.trials[number]
    family = family_of(bed, search.calls, search.groups, trial.start)
    fit = least_squares.iterate(_problem(bed, family, trial.losses[0][0]), trial.fit)
    held_loss = bed.loss(bed.errors(family.history(fit.numbers), held=True))
    better = held_loss < trial.best_loss
    trial = trial._replace(
        fit=fit,
        best=fit.numbers if better else trial.best,
        best_loss=held_loss if better else trial.best_loss,
        losses=(*trial.losses, (bed.loss(fit.errors), held_loss)),
        stalled=0 if held_loss < trial.best_loss - WORTHWHILE else trial.stalled + 1,
    )
    return search._replace(trials=(*search.trials[:number], trial, *search.trials[number + 1 :]))


def iterations_left(search: Search) -> int:
    """Guesses how many more iterations a search makes; 0 at its end."""
    if search.current is None:
        return 0
    leader = search.leader
    return max(USUAL - leader.iterations, PATIENCE - leader.stalled, 1)


def result(bed: Bed, search: Search) -> History:
    """Returns the best sampler that the search has found, on held-out noise; never worse than a hand-made one."""
    leader = search.leader
    return family_of(bed, search.calls, search.groups, leader.start).history(leader.best)


def error_ratio(search: Search) -> float:
    """Returns the typical error on held-out noise over that of the best hand-made sampler."""
    return float(np.exp(search.leader.best_loss - search.hand_made))


def family_of(bed: Bed, calls: int, groups: tuple[str, ...], start: tuple[str, str]) -> Family:
    """Returns the family around a hand-made sampler; the arguments are as in `Search` and `Trial`."""
    base, grid = start
    return Family(
        bed.schedule, starts.solver(base), np.asarray(starts.grid(bed.schedule, grid, calls), np.float64), groups=groups
    )


def _problem(bed, family, start_loss=0.0):
    """Returns the least-squares problem of a family on the training noises; start_loss is that of all zeros."""

    def errors(numbers):
        try:
            return bed.errors(family.history(numbers), held=False)
        except InputError:  # the solver cannot take the grid
            return np.full(bed.count, np.inf)

    def equations(numbers, weights):
        history, derivative = family.history(numbers), family.derivative(numbers)
        total, begin = [0.0, 0.0], 0
        for part, target in zip(bed.train, bed.train_targets, strict=True):
            samples, moves = rollout.run_with_jacobian(bed.asked, history, derivative, part)
            of_part = weights[begin : begin + len(part.x)].astype(np.float32)
            sums = _sums(bed.compared, samples, moves, target, of_part)
            total = [so_far + np.asarray(more, np.float64) for so_far, more in zip(total, sums, strict=True)]
            begin += len(part.x)
        return total[0] / begin, total[1] / begin

    ridge = least_squares.RIDGE * bed.compared.scale(np.exp(start_loss))
    return least_squares.Problem(errors, equations, family.corrections(), bed.compared, ridge)


@jax.jit
def _errors(compared, samples, targets):
    return compared.of(compared.differences(samples, targets))


@jax.jit
def _sums(compared, samples, moves, targets, weights):
    """Returns sum_n w_n J_n^T W_n J_n and sum_n w_n J_n^T W_n r_n of a batch, means over the numbers compared."""
    residuals, along = jax.linearize(lambda x: compared.differences(x, targets), samples)
    jacobian = jax.vmap(along)(moves)
    weighted = jacobian * (weights[:, None] * compared.pull(residuals) / residuals.shape[1])[None]
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("pnr,qnr->pq", weighted, jacobian), jnp.einsum("pnr,nr->p", weighted, residuals)
