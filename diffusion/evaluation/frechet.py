"""Measures the Frechet distance between two sets of feature vectors, or between their means and covariances."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError


class Moments(NamedTuple):
    """Holds what the Frechet distance uses of a set of feature vectors.

    Attributes:
      mean: float64.
      cov: covariance, float64, unbiased (divided by N - 1).
    """

    mean: Float[np.ndarray, "D"]
    cov: Float[np.ndarray, "D D"]


def moments(features: Float[np.ndarray, "N D"]) -> Moments:
    """Returns the mean and covariance of at least two vectors, in float64.

    Raises:
      InputError: the shape is another, there are fewer vectors, or a value is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise InputError(f"features have shape {features.shape}; give at least 2 vectors as [N, D]")
    if not np.isfinite(features).all():
        raise InputError("features hold values that are not finite; look at the images they come from")
    return Moments(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Returns the squared 2-Wasserstein distance of the two Gaussians with the sets' means and covariances.

    With fewer vectors than dimensions a covariance is singular and the distance biased up, but still defined.

    Args:
      a, b: one feature vector per row, at least two rows each; the result has the features' unit squared.

    Raises:
      InputError: the shapes do not fit, or a value is not finite.
    """
    return frechet_between(moments(a), moments(b))


def frechet_between(a: Moments, b: Moments) -> float:
    """Returns the Frechet distance of two sets whose means and covariances are given; 0 if these are equal.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}) (Heusel et al., arXiv:1706.08500, Eq. 6). With any factors
    A = F F^T and B = G G^T the trace is the least |F - G U|^2 over orthogonal U (Bhatia et al., arXiv:1712.01504,
    Theorem 1). As a sum of squares it is never negative, and small distances keep their digits, which cancel in the
    difference of traces.

    Raises:
      InputError: the numbers of dimensions differ.
    """
    if a.mean.shape != b.mean.shape or not a.cov.shape == b.cov.shape == a.mean.shape * 2:
        raise InputError(
            f"features have {a.mean.shape} and {b.mean.shape} dimensions, covariances {a.cov.shape} and {b.cov.shape}; "
            "give two sets of the same feature space"
        )
    mean = a.mean - b.mean
    if np.array_equal(a.cov, b.cov):  # the best U is then only the identity up to rounding
        return float(mean @ mean)
    # U is the orthogonal part of G^T F (Procrustes).
    first, second = _factor(a.cov), _factor(b.cov)
    left, _, right = np.linalg.svd(second.T @ first)
    return float(mean @ mean + np.square(first - second @ (left @ right)).sum())


def _factor(cov):
    """Returns F with F F^T = cov, whose directions without variance are zero and not the roots of rounding errors."""
    values, vectors = np.linalg.eigh(cov)
    rounding = len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors * np.sqrt(np.where(values > rounding, values, 0))
