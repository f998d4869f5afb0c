"""The Levenberg-Marquardt method, for the few numbers of a sampler and many residuals.

It minimises loss(e_1, ..., e_N) + ridge |corrections|^2, where e_n is the error of sample n and the loss one of
`losses`, by reweighting: each iteration needs the sums of J^T W J and J^T W r only, which add up over batches, and
there is no learning rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.learning.losses import Errors, Loss

RIDGE = 1e-3
MAX_STEP, MAX_DAMPING = 1.0, 100.0
"""No number moves further in one iteration; a step that does not help is shortened until the damping is so large."""

Vector = Float[np.ndarray, "P"]


class Problem(NamedTuple):
    """What is minimised.

    Attributes:
      errors: numbers -> e_n; what cannot be computed there is inf.
      equations: (numbers, weights w_n) -> (J^T W J, J^T W r), means over samples and residuals.
      corrections: 1 for the numbers that the ridge draws to 0, else 0.
      loss: how much the errors count.
      ridge: of the corrections.
    """

    errors: Callable[[Vector], Errors]
    equations: Callable[[Vector, Errors], tuple[Float[np.ndarray, "P P"], Vector]]
    corrections: Vector
    loss: Loss = Loss()
    ridge: float = RIDGE

    def objective(self, numbers: Vector, errors: Errors) -> float:
        """Returns what is minimised."""
        return self.loss.mean(errors) + self.ridge * float(np.sum(self.corrections * numbers**2))


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


def begin(problem: Problem, numbers: Vector) -> Fit:
    """Returns the state before the first iteration."""
    errors = problem.errors(numbers)
    return Fit(numbers, errors, problem.objective(numbers, errors))


def iterate(problem: Problem, fit: Fit) -> Fit:
    """Makes one iteration: the equations once, and steps of more and more damping until one helps."""
    normal, slope = problem.equations(fit.numbers, problem.loss.weights(fit.errors))
    normal = normal + np.diag(problem.ridge * problem.corrections)
    slope = slope + problem.ridge * problem.corrections * fit.numbers
    if not slope.any():  # nothing moves the errors, as where all samples are at the end of the range
        return fit._replace(gain=0.0)
    damping = fit.damping
    while damping <= MAX_DAMPING:
        damped = normal + damping * np.diag(np.diag(normal)) + 1e-9 * np.trace(normal) * np.eye(len(normal))
        step = -np.linalg.solve(damped, slope)
        numbers = fit.numbers + step * min(1.0, MAX_STEP / np.abs(step).max())
        errors = problem.errors(numbers)
        objective = problem.objective(numbers, errors)
        if objective < fit.objective:
            return Fit(numbers, errors, objective, max(damping / 5, 1e-5), fit.objective - objective)
        damping *= 5
    return fit._replace(gain=0.0)
