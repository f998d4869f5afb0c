"""`differentiable` gives the derivatives of any solver's table with respect to its grid tau, to learn when to step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import timesteps
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.table import SamplerTable


def differentiable(
    solver: Callable[..., SamplerTable], schedule: NoiseSchedule, num_steps: int, **options: Any
) -> Callable[[Float[Array, "S+1"]], SamplerTable]:
    """Turns a solver into a function of tau that JAX can trace and differentiate once.

    Solvers are NumPy, so a callback builds the table, in float64. Its Jacobian comes from central differences of that
    build: no derivative is written by hand, and it costs 2 S more builds, of about a millisecond or less each at 10
    steps. Where the schedule has a kink (a whole timestep), a derivative is the mean of the two sides.

    Args:
      solver: from this package.
      schedule: the noise schedule.
      num_steps: S; it fixes the table's shape.
      options: the keyword arguments of the solver.

    Returns:
      tau -> table. tau is real, strictly descending in (0, T] and then 0; the last entry has no derivative. A tau that
      is no grid raises the solver's InputError out of the callback.
    """
    example = solver(schedule, timesteps.uniform(schedule, num_steps), **options)
    flat, structure = jax.tree.flatten(example)

    def build(tau):
        """Builds the arrays of the table."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(solver(schedule, tau, **options))]

    def build_with_jacobian(tau):
        """Builds the arrays, and the derivatives of each by tau."""
        return build(tau), _jacobian(build, tau, schedule.num_timesteps)

    def call(function, results, tau):
        """Computes function(tau) in float64 on the host and brings it here in tau's precision."""
        dtype = tau.dtype

        def on_host(tau):
            """Runs in NumPy, outside of the traced program."""
            return jax.tree.map(lambda leaf: leaf.astype(dtype), function(np.asarray(tau, np.float64)))

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), results)
        return jax.pure_callback(on_host, shapes, tau, vmap_method="sequential")

    @jax.custom_jvp
    def leaves(tau):
        """Builds the arrays inside of a traced program."""
        return call(build, flat, tau)

    @leaves.defjvp
    def leaves_jvp(primals, tangents):
        """Moves tau in a direction: each array changes by its Jacobian times it."""
        (tau,), (direction,) = primals, tangents
        jacobians = [np.empty((*leaf.shape, num_steps + 1)) for leaf in flat]
        values, slopes = call(build_with_jacobian, (flat, jacobians), tau)
        return values, [jnp.tensordot(slope, direction, axes=1) for slope in slopes]

    return lambda tau: jax.tree.unflatten(structure, leaves(jnp.asarray(tau)))


def _jacobian(build: Callable, tau: Float[np.ndarray, "S+1"], latest: float) -> list[np.ndarray]:
    """Differentiates the arrays of build(tau) by central differences; the last axis of each result is tau's."""
    columns = []
    for i in range(tau.size - 1):
        # A step of the difference stays within a tenth of the way to a neighbour, and does not pass T.
        width = min(1e-3, 0.1 * (tau[i] - tau[i + 1]), 0.1 * (tau[i - 1] - tau[i]) if i else 1e-3)
        up, down = tau.copy(), tau.copy()
        up[i], down[i] = min(tau[i] + width, latest), tau[i] - width
        pairs = zip(build(up), build(down), strict=True)
        columns.append([(a - b) / (up[i] - down[i]) for a, b in pairs])
    # tau ends at 0 in every grid, so nothing changes with its last entry.
    columns.append([np.zeros_like(derivative) for derivative in columns[0]])
    return [np.stack(parts, axis=-1) for parts in zip(*columns, strict=True)]
