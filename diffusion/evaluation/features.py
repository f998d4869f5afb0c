"""What is known of a real set in a space of features, and the figures of samples against it.

A figure is named after its space: a distance is FID, and a score the Inception Score, in Inception's space alone.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.data import Dataset, fingerprint
from diffusion.errors import InputError, is_whole, nearest
from diffusion.evaluation.cache import cached
from diffusion.evaluation.metrics import (
    Manifolds,
    Moments,
    class_score,
    frechet_between,
    kernel_distance,
    moments,
    prdc,
)
from diffusion.evaluation.spaces import Features, FeatureSpace, classifier, inception, pixels
from diffusion.files import write_atomically

__all__ = [
    "INCEPTION_NAMES",
    "METRICS",
    "FeatureSpace",
    "Features",
    "Reference",
    "classifier",
    "figure_names",
    "inception",
    "make_reference",
    "measure",
    "pixels",
    "plain_names",
    "too_few",
]

METRICS = ("frechet", "kernel", "score", "prdc")
INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "score": "is"}
"""What three of them are called in Inception's space, and in no other."""

MAX_VECTORS = 10_000
"""Vectors of either set, drawn at random from larger ones, that the kernel distance and prdc use."""

_FORMAT, _CHUNK = "jax-fast-diffusion reference 1", 1000


class Reference(NamedTuple):
    """What is known of a real set in a feature space.

    Attributes:
      moments: of all its `identity["count"]` images.
      vectors: of all, or of 10,000 drawn at random.
      identity: "space", "key", "image_shape", "split", "count" and "data", for reports; figures against references
        of other identities are not comparable.
    """

    moments: Moments
    vectors: Float[np.ndarray, "M D"]
    identity: dict[str, Any]


def make_reference(
    space: FeatureSpace, dataset: Dataset, cache_folder: str | os.PathLike, *, split: str = "", count: int = 0
) -> Reference:
    """The real set's features, from the cache if they are there; a damaged or foreign file is replaced with a warning.

    Args:
      space: from `pixels`, `classifier` or `inception`.
      dataset: the real set.
      cache_folder: made if it is not there.
      split: the data's, for the record and the cache's key.
      count: images, drawn at random but always the same; 0 takes all.

    Raises:
      InputError: count exceeds the set or is 1, images that the space does not take, or the folder cannot be made.
    """
    total = len(dataset.images)
    if not is_whole(count) or count == 1 or not 0 <= count <= total:
        raise InputError(f"count is {count}; the set has {total:,} images: give 2 to as many, or 0 for all")
    shape = [int(n) for n in dataset.images.shape[1:]]
    facts = {"format": _FORMAT, "space": space.name, "key": space.key, "image_shape": shape, "split": split}
    facts |= {"count": int(count) or total, "data": fingerprint(dataset)}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cached(
        Path(cache_folder, f"{space.name}-{name}.npz"),
        load=lambda path: _load(path, facts),
        make=lambda: _make(space, dataset, facts),
        save=_save,
    )


def _make(space, dataset, facts):
    chosen = _draw(len(dataset.images), facts["count"])
    parts = np.array_split(chosen, math.ceil(len(chosen) / _CHUNK))
    vectors = np.concatenate([space.extract(np.asarray(dataset.images[part])).vectors for part in parts])
    return Reference(moments(vectors), vectors[_draw(len(vectors), MAX_VECTORS)], facts)


def _draw(total, count):
    """In order; always the same."""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def _save(path, reference):
    buffer = io.BytesIO()
    mean, cov = reference.moments
    np.savez(buffer, mean=mean, cov=cov, vectors=reference.vectors, identity=json.dumps(reference.identity))
    write_atomically(path, buffer.getvalue())


def _load(path, facts):
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip, which has a checksum of every array
            identity = json.loads(str(file["identity"]))
            found = Reference(Moments(file["mean"], file["cov"]), file["vectors"], identity)
    except Exception as error:  # damaged files make it raise nearly anything
        raise InputError(f"it is damaged ({' '.join(str(error).split())[:100]})") from error
    if identity != facts or found.vectors.shape[1:] != found.moments.mean.shape:
        raise InputError("it is of another set or space")
    return found


def measure(reference: Reference, features: Features, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Figures of samples against the real set.

    Args:
      reference: the real set.
      features: of the samples, in the same space; quantise them to uint8 as files would be.
      metrics: "frechet", "kernel", "score", "prdc"; in Inception's space also "fid", "kid" and "is" for the first
        three. See `metrics` for what each means; kernel and prdc see 10,000 vectors of either set at most.

    Returns:
      "frechet_<space>", "kernel_<space>", "kernel_<space>_std", "score_<space>", "score_<space>_std" and
      "precision_<space>", "recall_", "density_", "coverage_"; in Inception's space "fid", "kid", "kid_std", "is",
      "is_std", "precision", "recall", "density" and "coverage".

    Raises:
      InputError: an unknown metric, one of Inception's in another space, the score in a space without classes,
        features of another size, or too few of them for a metric.
    """
    space, result = reference.identity["space"], {}
    if features.vectors.ndim != 2 or features.vectors.shape[1:] != reference.moments.mean.shape:
        raise InputError(
            f"features have shape {features.vectors.shape}, the reference {reference.moments.mean.shape[0]} dimensions "
            f"of the space {space!r}; extract both in one space"
        )
    for metric in plain_names(metrics, space):
        result |= zip(figure_names(metric, space), _figures(metric, reference, features, space), strict=True)
    return result


def plain_names(metrics: Sequence[str], space: str) -> list[str]:
    """The metrics without repetitions, each by its name in METRICS.

    Raises:
      InputError: there is none, an unknown one, one of Inception's in another space, or the score of pixels.
    """
    if not metrics:
        raise InputError(f"no metric is named; valid: {', '.join(METRICS)}")
    return list(dict.fromkeys(_plain_name(name, space) for name in metrics))


def figure_names(metric: str, space: str) -> list[str]:
    """What `measure` calls the figures of one of METRICS."""
    if metric == "prdc":
        return [name if space == "inception" else f"{name}_{space}" for name in Manifolds._fields]
    name = INCEPTION_NAMES[metric] if space == "inception" else f"{metric}_{space}"
    return [name] if metric == "frechet" else [name, f"{name}_std"]


def _plain_name(name, space):
    for plain, special in INCEPTION_NAMES.items():
        if name == special and space == "inception":
            return plain
        if name == special:
            raise InputError(f"{name!r} exists in Inception's space alone; in the space {space!r} ask for {plain!r}")
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}; {nearest(name, (*METRICS, *INCEPTION_NAMES.values()))}")
    if name == "score" and space == "pixels":
        raise InputError("pixels have no classes, which the score needs; use the classifier or Inception")
    return name


def _figures(metric, reference, features, space):
    """The values that figure_names names."""
    fake = features.vectors[_draw(len(features.vectors), MAX_VECTORS)]
    if metric == "prdc":
        return prdc(reference.vectors, fake)
    if metric == "frechet":
        return [frechet_between(reference.moments, moments(features.vectors))]
    if metric == "kernel":
        return kernel_distance(reference.vectors, fake)
    if features.probabilities is None:
        raise InputError(f"the space {space!r} has no classes, which the score needs; use the classifier or Inception")
    return class_score(features.probabilities)


def too_few(reference: Reference, features: Features) -> str:
    """A sentence to warn with where a set has no more vectors than dimensions; else "".

    The Frechet distance is then biased up and by how much depends on the numbers, so that it can be compared with
    figures of the same numbers alone.
    """
    dim, real, fake = len(reference.moments.mean), reference.identity["count"], len(features.vectors)
    if min(real, fake) > dim:
        return ""
    return (
        f"the Frechet distance of {fake:,} samples to {real:,} real images in {dim:,} dimensions is biased up; "
        f"take more than {dim:,} of each, and compare it with figures of the same numbers alone"
    )
