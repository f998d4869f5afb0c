"""The Levenberg-Marquardt method, for the few numbers of a sampler and many residuals.

It minimises

    mean_n log(e_n + floor) + ridge |corrections|^2,       e_n = mean square of the residuals of sample n,

by reweighting: a few samples that end at another image would rule a plain mean, which a floor far above all errors
gives. Each iteration needs the sums of J^T W J and J^T W r only, which add up over batches, and there is no learning
rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FLOOR, RIDGE = 1e-3, 1e-3
MAX_STEP, ATTEMPTS = 1.0, 6
"""No number moves further in one iteration; a step that does not help is shortened so many times."""

Vector = Float[np.ndarray, "P"]
Errors = Float[np.ndarray, "N"]


class Problem(NamedTuple):
    """What is minimised.

    Attributes:
      errors: numbers -> e_n; what cannot be computed there is inf.
      equations: (numbers, weights w_n) -> (J^T W J, J^T W r), means over samples and residuals.
      corrections: 1 for the numbers that the ridge draws to 0, else 0.
      floor: an error at which a sample counts as reached.
      ridge: of the corrections.
    """

    errors: Callable[[Vector], Errors]
    equations: Callable[[Vector, Errors], tuple[Float[np.ndarray, "P P"], Vector]]
    corrections: Vector
    floor: float = FLOOR
    ridge: float = RIDGE

    def objective(self, numbers: Vector, errors: Errors) -> float:
        """Returns what is minimised."""
        within = float(np.mean(np.log(errors + self.floor))) if np.isfinite(errors).all() else np.inf
        return within + self.ridge * float(np.sum(self.corrections * numbers**2))


class Fit(NamedTuple):
    """Where the method stands.

    Attributes:
      numbers: at their best.
      errors: there.
      objective: there.
      damping: lambda, how much the next step is held back.
      gain: by how much the last iteration lowered the objective; 0 where no step helped.
    """

    numbers: Vector
    errors: Errors
    objective: float
    damping: float = 1e-2
    gain: float = np.inf


def typical(errors: Errors, floor: float = FLOOR) -> float:
    """Returns the logarithm of the typical squared error, exp(mean_n log(e_n + floor)) - floor.

    It ascends with what is minimised, and is that of the mean where the floor is far above all errors, or of the
    geometric mean where it is far below; infinite if an error is not finite.
    """
    if not np.isfinite(errors).all():
        return np.inf
    return float(np.log(max(floor * np.expm1(np.mean(np.log1p(errors / floor))), np.finfo(np.float64).tiny)))


def begin(problem: Problem, numbers: Vector) -> Fit:
    """Returns the state before the first iteration."""
    errors = problem.errors(numbers)
    return Fit(numbers, errors, problem.objective(numbers, errors))


def iterate(problem: Problem, fit: Fit) -> Fit:
    """Makes one iteration: the equations once, and steps of more and more damping until one helps."""
    weights = 1 / (fit.errors + problem.floor)
    normal, slope = problem.equations(fit.numbers, weights)
    normal = normal + np.diag(problem.ridge * problem.corrections)
    slope = slope + problem.ridge * problem.corrections * fit.numbers
    if not slope.any():  # nothing moves the errors, as where all samples are at the end of the range
        return fit._replace(gain=0.0)
    damping = fit.damping
    for _ in range(ATTEMPTS):
        damped = normal + damping * np.diag(np.diag(normal)) + 1e-9 * np.trace(normal) * np.eye(len(normal))
        step = -np.linalg.solve(damped, slope)
        numbers = fit.numbers + step * min(1.0, MAX_STEP / np.abs(step).max())
        errors = problem.errors(numbers)
        objective = problem.objective(numbers, errors)
        if objective < fit.objective:
            return Fit(numbers, errors, objective, max(damping / 5, 1e-5), fit.objective - objective)
        damping *= 5
    return fit._replace(damping=damping, gain=0.0)
