"""Distances and scores of sets of feature vectors; which features they are is the caller's affair.

NumPy in float64. The Frechet distance has its own file.
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
"""Of the kernel distance, as in the paper's code, where both sets are as large."""

BLOCK_VALUES = 2**24
"""Distances held at a time: 128 MiB."""


class Estimate(NamedTuple):
    """A mean over parts of the samples, and the standard deviation (divided by their number) between the parts."""

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
    """Squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, unbiased, over random subsets.

    Demystifying MMD GANs (arXiv:1801.01401), section 4; KID where the features are Inception's. It has no bias at any
    number of samples, and so may be slightly below zero for equal distributions.

    Args:
      a, b: one feature vector a row.
      subsets: pairs of subsets, at least 1. Where a subset is a whole set they differ less, and std says little.
      subset_size: vectors in each, drawn without replacement, 2 to the size of the smaller set; None is 1,000, or the
        smaller set where that has fewer. The mean's expectation does not depend on it.
      seed: which subsets, at least 0.

    Raises:
      InputError: an argument out of its range, shapes that do not fit, or a value that is not finite.
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
    """The unbiased estimate (Gretton et al., JMLR 13, 2012, Eq. 3) from as many vectors of each."""
    size, dim = x.shape

    def within(v):
        kernel = (v @ v.T / dim + 1) ** 3
        return (kernel.sum() - np.trace(kernel)) / (size * (size - 1))

    return within(x) + within(y) - 2 * ((x @ y.T / dim + 1) ** 3).mean()


def class_score(probabilities: Float[np.ndarray, "N K"], splits: int = 10) -> Estimate:
    """exp of the mean KL divergence of p(class | image) from the mean p(class), over consecutive parts of the set.

    Improved Techniques for Training GANs (arXiv:1606.03498), section 4; the Inception Score where the classifier is
    Inception. Between 1 (all images are of the same classes) and K (sure of each image, all classes alike). A part
    of n images can reach at most n. Images in the order of their classes make parts of few classes: mix them first.

    Args:
      probabilities: of K classes, a row an image, each summing to 1.
      splits: number of parts, 1 to N.

    Raises:
      InputError: probabilities that are none, or splits out of range.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or 0 in p.shape or not np.all(p >= 0) or not np.allclose(p.sum(axis=1), 1, atol=1e-4):
        raise InputError(f"probabilities of shape {p.shape} must be [N, K], not negative, with rows that sum to 1")
    _require_whole("splits", splits, 1, len(p))
    scores = []
    for part in np.array_split(p, splits):
        ratio = np.divide(part, part.mean(axis=0, keepdims=True), out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


class Manifolds(NamedTuple):
    """How two sets cover each other, by balls that reach from each vector to its k-th neighbour in its own set.

    Attributes:
      precision: share of the fakes in a real one's ball; 0..1, quality.
      recall: share of the reals in a fake one's ball; 0..1, diversity.
      density: balls of reals that a fake lies in, divided by k; about 1 for equal distributions, may exceed it.
      coverage: share of the reals whose ball holds a fake; 0..1. Even for equal distributions it is about 1 - 2^-k.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Float[np.ndarray, "N D"], fake: Float[np.ndarray, "M D"], k: int = 5) -> Manifolds:
    """Precision and recall (arXiv:1904.06991, Eq. 1-3), density and coverage (arXiv:2002.09797, Eq. 4-5).

    All depend on the sizes of the sets: compare figures of the same N, M and k alone. Distances are computed in blocks.

    Args:
      real, fake: one feature vector a row.
      k: which neighbour, 1 to one less than the smaller set; a vector is not its own neighbour.

    Raises:
      InputError: k out of range, shapes that do not fit, or a value that is not finite.
    """
    real, fake = _check(real, fake)
    _require_whole("k", k, 1, min(len(real), len(fake)) - 1)
    # Distances do not change by a common shift, but their rounding does.
    center = real.mean(axis=0, keepdims=True)
    real, fake = real - center, fake - center
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
    """Squared distance of each vector to its k-th neighbour."""
    radii = np.empty(len(x))
    for rows in _blocks(x, x):
        distances = _squared_distances(x[rows], x)
        # A copy of the vector is a neighbour, the vector itself is not.
        np.put_along_axis(distances, np.arange(len(x))[rows, None], -1.0, axis=1)
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _squared_distances(x, y):
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * (x @ y.T), 0)


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
