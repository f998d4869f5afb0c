"""Measures distances and scores of sets of feature vectors; the caller chooses the features.

All is NumPy in float64. The Frechet distance has its own file.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, is_whole, require_range
from diffusion.evaluation.frechet import Moments, frechet_between, frechet_distance, moments

__all__ = [
    "Estimate",
    "Manifolds",
    "Moments",
    "class_score",
    "frechet_between",
    "frechet_distance",
    "kernel_distance",
    "moments",
    "prdc",
]

SUBSET_SIZE = 1000
"""Vectors in a subset for the kernel distance, as in the paper's code, if both sets have so many."""

BLOCK_VALUES = 2**24
"""At most so many distances are held in memory at a time: 128 MiB."""


class Estimate(NamedTuple):
    """Holds a mean over parts of the samples, and the standard deviation between parts (divided by their number)."""

    mean: float
    std: float


def kernel_distance(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Returns the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, over random subsets.

    Demystifying MMD GANs (arXiv:1801.01401), section 4; it is KID if the features are Inception's. It is unbiased at
    any number of samples, so for equal distributions it may be slightly below zero.

    Args:
      a, b: one feature vector per row.
      subsets: number of pairs of subsets, at least 1. If a subset is a whole set, they differ less and std says little.
      subset_size: vectors in each, drawn without replacement, from 2 to the size of the smaller set; None is 1,000, or
        the smaller set if it has fewer. The mean's expectation does not depend on it.
      seed: decides the subsets, at least 0.

    Raises:
      InputError: an argument is out of its range, shapes do not fit, or a value is not finite.
    """
    a, b = _check(a, b)
    smaller = min(len(a), len(b))
    size = min(SUBSET_SIZE, smaller) if subset_size is None else subset_size
    for name, value, low, high in (("subsets", subsets, 1, np.inf), ("subset_size", size, 2, smaller)):
        _require_whole(name, value, low, high)
    rng = np.random.default_rng(seed)
    values = [_mmd(a[rng.choice(len(a), size, False)], b[rng.choice(len(b), size, False)]) for _ in range(subsets)]
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _mmd(x, y):
    """Returns the unbiased estimate (Gretton et al., JMLR 13, 2012, Eq. 3) from two sets of equal size."""
    size, dim = x.shape

    def within(v):  # mean kernel over pairs of different vectors
        kernel = (v @ v.T / dim + 1) ** 3
        return (kernel.sum() - np.trace(kernel)) / (size * (size - 1))

    return within(x) + within(y) - 2 * ((x @ y.T / dim + 1) ** 3).mean()


def class_score(probabilities: Float[np.ndarray, "N K"], splits: int = 10) -> Estimate:
    """Returns exp of the mean KL divergence of p(class | image) from the mean p(class), over parts of the set.

    Improved Techniques for Training GANs (arXiv:1606.03498), section 4; it is the Inception Score if the classifier is
    Inception. It lies between 1 (the same for every image) and K (sure of each image, all classes equally frequent); a
    part of n images can reach at most n. Parts are consecutive, so images sorted by class must be mixed first.

    Args:
      probabilities: of K classes, one row per image, each summing to 1.
      splits: number of parts, 1 to N.

    Raises:
      InputError: the rows are not probabilities, or splits is out of range.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or 0 in p.shape or not np.all(p >= 0) or not np.allclose(p.sum(axis=1), 1, atol=1e-4):
        raise InputError(f"probabilities of shape {p.shape} must be [N, K], not negative, with rows that sum to 1")
    _require_whole("splits", splits, 1, len(p))
    scores = []
    for part in np.array_split(p, splits):
        # p(class | image) / p(class); a class of probability 0 adds nothing to the divergence.
        ratio = np.divide(part, part.mean(axis=0, keepdims=True), out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


class Manifolds(NamedTuple):
    """Says how two sets cover each other, by balls that reach from each vector to its k-th neighbour in its own set.

    Attributes:
      precision: share of the fake vectors that lie in some real one's ball, 0..1; measures quality.
      recall: share of the real vectors that lie in some fake one's ball, 0..1; measures diversity.
      density: mean number of real balls that a fake lies in, divided by k; about 1 for equal distributions, or above.
      coverage: share of the real vectors whose ball holds a fake, 0..1; about 1 - 2^-k even for equal distributions.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Float[np.ndarray, "N D"], fake: Float[np.ndarray, "M D"], k: int = 5) -> Manifolds:
    """Returns precision and recall (arXiv:1904.06991, Eq. 1-3), density and coverage (arXiv:2002.09797, Eq. 4-5).

    All depend on the sizes of the sets: compare only figures for the same N, M and k.

    Args:
      real, fake: one feature vector per row.
      k: which neighbour a ball reaches, 1 to one less than the smaller set; a vector is not its own neighbour.

    Raises:
      InputError: k is out of range, shapes do not fit, or a value is not finite.
    """
    real, fake = _check(real, fake)
    _require_whole("k", k, 1, min(len(real), len(fake)) - 1)
    # A common shift leaves the distances as they are, but makes their rounding errors smaller.
    center = real.mean(axis=0, keepdims=True)
    real, fake = real - center, fake - center

    # Squared distances of all pairs, in blocks of rows to save memory: who lies in whose ball?
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    balls, recalled, covered = np.zeros(len(fake), np.int64), [], []
    for rows in _blocks(real, fake):
        distances = _squared_distances(real[rows], fake)
        inside = distances <= real_radius[rows, None]
        balls += inside.sum(axis=0)
        covered.append(inside.any(axis=1))
        recalled.append((distances <= fake_radius[None, :]).any(axis=1))
    shares = (balls > 0).mean(), np.concatenate(recalled).mean(), balls.mean() / k, np.concatenate(covered).mean()
    return Manifolds(*map(float, shares))


def _radii(x, k):
    """Returns the squared distance of each vector to its k-th neighbour."""
    radii = np.empty(len(x))
    for rows in _blocks(x, x):
        distances = _squared_distances(x[rows], x)
        # A vector comes first in its own row, before even its copies, so that the k-th after it is a true neighbour.
        np.put_along_axis(distances, np.arange(len(x))[rows, None], -1.0, axis=1)
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _squared_distances(x, y):
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * (x @ y.T), 0)  # which can round below zero


def _blocks(rows, columns):
    size = max(1, BLOCK_VALUES // len(columns))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _check(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] < 1 or min(len(a), len(b)) < 2:
        raise InputError(
            f"features have shapes {a.shape} and {b.shape}; give two sets of at least 2 vectors of one size"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("features hold values that are not finite; look at the images they come from")
    return a, b


def _require_whole(name, value, low, high):
    if not is_whole(value):
        raise InputError(f"{name} is {value!r}; give a whole number of at least {low}")
    require_range(name, value, low, high)
