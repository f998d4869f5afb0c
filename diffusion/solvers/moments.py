"""The exact moments of a table's samples where the data is Gaussian: what its tests are made of."""

import numpy as np

from diffusion.errors import InputError
from diffusion.solvers.table import SamplerTable


def gaussian_moments(table: SamplerTable, mean, covariance, start=None):
    """Computes the exact mean and covariance of the samples when the data is Gaussian, with no sampling.

    For such data the ideal D is affine in x, D = mean + a C (a^2 C + n^2)^{-1} (x - a mean), so the registers stay
    jointly Gaussian and the table determines their moments, along each principal axis of C.

    Args:
      table: any table without learned variance.
      mean: of the data; a number, or [d].
      covariance: of the data; a number, or [d, d], symmetric.
      start: (mean, variance) of every coordinate of register 0 at the start; (0, table.start_std^2) if not given, as
        `sample` starts. Numbers or [d] along the principal axes.

    Returns:
      (mean, covariance) of the samples, shaped as given, float64.

    Raises:
      InputError: the table has a learned variance, or goes from samples to noise and no start is given.
    """
    if table.log_variance is not None:
        raise InputError(f"{table.name}: the variance of the steps is the network's, not the table's")
    if table.tau[0] < table.tau[-1] and start is None:
        raise InputError(f"{table.name} starts from images; give their moments as start")
    if np.ndim(covariance) == 0:
        first, second = _axis_moments(table, np.atleast_1d(mean), np.atleast_1d(covariance), start)
        return (float(first[0]), float(second[0])) if first.size == 1 else (first, float(second[0]))
    variances, axes = np.linalg.eigh(np.asarray(covariance, np.float64))
    mean = np.broadcast_to(np.asarray(mean, np.float64), variances.shape)
    first, second = _axis_moments(table, axes.T @ mean, variances, start)
    return axes @ first, (axes * second) @ axes.T


def _axis_moments(table, mean, variance, start):
    """Propagates mean and variance of d independent coordinates, each [d], and returns them, each [d]."""
    mean, variance = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(variance, np.float64))
    d, registers = mean.size, table.num_registers
    start_mean, start_variance = start or (0.0, table.start_std**2)
    shares = np.eye(registers)[0] if table.start is None else table.start / table.start[0]
    first = np.broadcast_to(start_mean, d)[:, None] * shares
    second = np.broadcast_to(start_variance, d)[:, None, None] * np.outer(shares, shares)
    for a, n, row in zip(table.signal, table.noise, table.update, strict=True):
        # The ideal D is affine in register 0, D = slope R_0 + (1 - slope a) mean, so it folds into that column.
        slope = a * variance / (a**2 * variance + n**2)
        from_d, from_z = row[:, -2], row[:, -1]
        linear = np.tile(row[:, :-2], (d, 1, 1))
        linear[:, :, 0] += slope[:, None] * from_d
        first = np.einsum("dij,dj->di", linear, first) + ((1 - slope * a) * mean)[:, None] * from_d
        second = linear @ second @ linear.transpose(0, 2, 1) + np.outer(from_z, from_z)
    return first[:, 0], second[:, 0, 0]
