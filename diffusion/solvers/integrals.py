"""Integrals over one step become weights here; v = u / h is the share of the step passed. NumPy float64."""

import numpy as np
from jaxtyping import Float

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = (1 + _NODES) / 2, _WEIGHTS / 2
"""Gauss-Legendre quadrature on 0..1: int_0^1 f dv = WEIGHTS @ f(NODES), exact for polynomials up to degree 63."""


def exponential_moments(z: float, count: int) -> Float[np.ndarray, "count"]:
    """Computes M_j = int_0^1 z e^{-z (1 - v)} v^j dv for j < count, to about 1e-15 relative.

    M_0 = 1 - e^{-z} and, by parts, M_j = 1 - (j / z) M_{j-1} (the phi-functions of exponential integrators: Hochbruck
    and Ostermann, Acta Numerica 2010, section 2).

    Args:
      z: rate times step, -50 < z <= inf; at inf the kernel sits at v = 1 and every moment is 1. A negative one is of
        the eps basis, whose kernel grows backwards.
      count: at least 1.
    """
    if z < 4:
        # The recursion subtracts nearly equal numbers here; Gauss-Legendre adds positive ones.
        return (z * WEIGHTS * np.exp(-z * (1 - NODES))) @ NODES[:, None] ** np.arange(count)
    moments = [-np.expm1(-z)]
    for j in range(1, count):
        moments.append(1 - j / z * moments[-1])
    return np.array(moments)


def lagrange_integrals(nodes: Float[np.ndarray, "p"], moments: Float[np.ndarray, "p"]) -> Float[np.ndarray, "p"]:
    """Integrates each Lagrange polynomial L_k over a step, given the integral moments[j] of each power v^j.

    With all nodes at or below 0 (a predictor) neither the coefficients of prod (v - v_j) nor the sum can cancel.

    Args:
      nodes: distinct v_k, in any order.
      moments: as many as nodes.
    """
    weights = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        polynomial = np.array([1.0])  # coefficients of prod (v - v_j), the constant first
        for other in others:
            polynomial = np.append(0.0, polynomial) - other * np.append(polynomial, 0.0)
        weights.append(polynomial @ moments / np.prod(node - others))
    return np.array(weights)
