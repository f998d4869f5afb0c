"""The Frechet distance between two sets of feature vectors."""

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError


def frechet_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians with the sets' means and covariances.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}) (Heusel et al., arXiv:1706.08500, Eq. 6), in float64 by
    eigendecompositions of symmetric matrices, which exist where a general matrix square root fails.

    Args:
      a, b: one feature vector a row, at least two rows each; the result has the features' unit squared.

    Raises:
      InputError: shapes that do not fit, or a value that is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"features have shapes {a.shape} and {b.shape}; give two sets of at least 2 vectors of one size"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("features hold values that are not finite")
    mean = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
