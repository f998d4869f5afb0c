"""Keeps what is known of a real set in a feature space, and measures samples against it.

A figure is named after its space: only in Inception's space is a distance called FID, or a score the Inception Score.
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
from jaxtyping import Float, Int32

from diffusion.data import Dataset, fingerprint
from diffusion.errors import InputError, is_whole, nearest
from diffusion.evaluation.cache import cached
from diffusion.evaluation.metrics import (
    SUBSET_SIZE,
    Manifolds,
    Moments,
    class_score,
    frechet_between,
    kernel_distance,
    moments,
    prdc,
)
from diffusion.evaluation.spaces import MAX_PIXELS, Features, FeatureSpace, classifier, inception, pixels
from diffusion.files import write_atomically

__all__ = [
    "ACCURACY",
    "INCEPTION_NAMES",
    "MAX_PIXELS",
    "METRICS",
    "FeatureSpace",
    "Features",
    "MetricSettings",
    "Reference",
    "classifier",
    "figure_names",
    "inception",
    "make_reference",
    "measure",
    "pixels",
    "plain_names",
    "settings",
    "too_few",
]

METRICS = ("frechet", "kernel", "score", "prdc")
ACCURACY = "accuracy"
"""The metric of samples of which a class was asked for, in the space of a classifier that knows the classes."""

INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid", "score": "is"}
"""What three of the metrics are called in Inception's space, and in no other."""

MAX_VECTORS = 10_000
"""The kernel distance and prdc use at most so many vectors of either set, drawn at random from a larger one."""

NEIGHBOURS, PARTS, PART_SIZE = 5, 10, 10
"""The k of prdc, the parts that the score is averaged over, and how many samples such a part should have at least."""

_FORMAT, _CHUNK = "jax-fast-diffusion reference 1", 1000


class Reference(NamedTuple):
    """Holds what is known of a real set in a feature space.

    Attributes:
      moments: mean and covariance over all its `identity["count"]` images.
      vectors: features of all these images, or of 10,000 drawn at random.
      identity: "space", "key", "image_shape", "split", "count" and "data", for reports; figures can be compared only
        if they are against references of the same identity.
    """

    moments: Moments
    vectors: Float[np.ndarray, "M D"]
    identity: dict[str, Any]


def make_reference(
    space: FeatureSpace, dataset: Dataset, cache_folder: str | os.PathLike, *, split: str = "", count: int = 0
) -> Reference:
    """Returns what is known of the real set, from the cache if it is there.

    A cached file that is damaged, or of another set or space, is replaced with a warning.

    Args:
      space: from `pixels`, `classifier` or `inception`.
      dataset: the real set.
      cache_folder: where files of references lie; made if it is not there. There is a warning if it cannot be used.
      split: name of the part of the data, for the record and the cache's key.
      count: how many images to use, drawn at random but always the same; 0 takes all.

    Raises:
      InputError: count exceeds the set or is 1, or the space does not take such images.
    """
    total = len(dataset.images)
    if not is_whole(count) or count == 1 or not 0 <= count <= total:
        raise InputError(f"count is {count}; the set has {total:,} images: give 2 to {total}, or 0 for all")
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
    """Returns up to count places in 0..total-1, drawn at random but always the same, in ascending order."""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def _save(path, reference):
    buffer = io.BytesIO()
    mean, cov = reference.moments
    np.savez(buffer, mean=mean, cov=cov, vectors=reference.vectors, identity=json.dumps(reference.identity))
    write_atomically(path, buffer.getvalue())


def _load(path, facts):
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip, so it checks every array's checksum
            identity = json.loads(str(file["identity"]))
            found = Reference(Moments(file["mean"], file["cov"]), file["vectors"], identity)
    except Exception as error:  # damaged files make it raise nearly any exception
        raise InputError(f"it is damaged ({' '.join(str(error).split())[:100]})") from error
    if identity != facts or found.vectors.shape[1:] != found.moments.mean.shape:
        raise InputError("it is of another set or space")
    return found


def measure(
    reference: Reference,
    features: Features,
    metrics: Sequence[str] = METRICS,
    labels: Int32[np.ndarray, "N"] | None = None,
) -> dict[str, float]:
    """Returns figures of samples measured against the real set.

    Args:
      reference: the real set.
      features: of the samples, in the same space; quantise samples to uint8 first, as image files are.
      metrics: "frechet", "kernel", "score", "prdc", "accuracy"; in Inception's space also "fid", "kid" and "is" for
        the first three. See `metrics` for what each means; kernel and prdc use at most 10,000 vectors of either set,
        and small sets lower what `settings` says. The accuracy is the share of samples that the classifier takes for
        the class that was asked for.
      labels: the classes that were asked for, numbered as the classifier's; for the accuracy.

    Returns:
      "frechet_<space>", "kernel_<space>", "kernel_<space>_std", "score_<space>", "score_<space>_std" and
      "precision_<space>", "recall_", "density_", "coverage_", "accuracy_<space>"; in Inception's space "fid",
      "kid", "kid_std", "is", "is_std", "precision", "recall", "density" and "coverage".

    Raises:
      InputError: a metric is unknown or needs another space, the score is asked for in a space without classes,
        features have another size, or are too few for a metric; labels are missing.
    """
    space, result = reference.identity["space"], {}
    names = plain_names(metrics, space)
    if features.vectors.ndim != 2 or features.vectors.shape[1:] != reference.moments.mean.shape:
        raise InputError(
            f"features have shape {features.vectors.shape}, and the reference has "
            f"{reference.moments.mean.shape[0]} dimensions in the space {space!r}; extract both in one space"
        )
    chosen = settings(names, reference.identity["count"], len(features.vectors))
    for metric in names:
        values = [_accuracy(features, labels)] if metric == ACCURACY else _figures(metric, reference, features, chosen)
        result |= zip(figure_names(metric, space), values, strict=True)
    return result


class MetricSettings(NamedTuple):
    """Holds what a metric takes of two sets: fewer than usual where the sets are small.

    Attributes:
      k: neighbours of prdc, 5 if both sets have so many.
      splits: parts that the score is averaged over, 10 if each then has at least 10 samples.
      subset_size: vectors in a subset of the kernel distance, 1,000 if both sets have so many.
      notes: a sentence for each of these that is lower than usual.
    """

    k: int
    splits: int
    subset_size: int
    notes: list[str]


def settings(metrics: Sequence[str], real: int, fake: int) -> MetricSettings:
    """Returns what `measure` takes of two sets of these sizes, so that it can be said before a sample is drawn.

    Args:
      metrics: of METRICS; only these are spoken of.
      real, fake: numbers of images.

    Raises:
      InputError: a set has fewer than 2 images.
    """
    smaller, notes = min(real, fake), []
    if smaller < 2:
        raise InputError(f"{fake:,} samples and {real:,} real images cannot be compared; take at least 2 of each")
    k, splits = min(NEIGHBOURS, smaller - 1), max(1, min(PARTS, fake // PART_SIZE))
    subset_size = min(SUBSET_SIZE, smaller)
    if "prdc" in metrics and k < NEIGHBOURS:
        notes.append(f"precision, recall, density and coverage take k = {k} of {smaller} images and not {NEIGHBOURS}")
    if "score" in metrics and splits < PARTS:
        notes.append(f"the score is of {splits} part(s) of {fake:,} samples and not of {PARTS}")
    if "kernel" in metrics and subset_size < SUBSET_SIZE:
        notes.append(
            f"the kernel distance takes subsets of {subset_size:,} images and not of {SUBSET_SIZE:,}, so that its "
            "standard deviation says little"
        )
    return MetricSettings(k, splits, subset_size, notes)


def plain_names(metrics: Sequence[str], space: str) -> list[str]:
    """Returns the metrics without repetitions, each by its name in METRICS.

    Raises:
      InputError: none is named, one is unknown or needs Inception's space, or the score is asked for in pixel space.
    """
    if not metrics:
        raise InputError(f"no metric is named; valid: {', '.join(METRICS)}")
    return list(dict.fromkeys(_plain_name(name, space) for name in metrics))


def figure_names(metric: str, space: str) -> list[str]:
    """Returns the names that `measure` gives the figures of a metric, one of METRICS."""
    if metric == "prdc":
        return [name if space == "inception" else f"{name}_{space}" for name in Manifolds._fields]
    name = INCEPTION_NAMES[metric] if space == "inception" else f"{metric}_{space}"
    return [name] if metric in ("frechet", ACCURACY) else [name, f"{name}_std"]


def _plain_name(name, space):
    for plain, special in INCEPTION_NAMES.items():
        if name == special and space == "inception":
            return plain
        if name == special:
            raise InputError(f"{name!r} exists only in Inception's space; in the space {space!r} ask for {plain!r}")
    if name not in (*METRICS, ACCURACY):
        raise InputError(f"unknown metric {name!r}; {nearest(name, (*METRICS, ACCURACY, *INCEPTION_NAMES.values()))}")
    if name == "score" and space == "pixels":
        raise InputError("pixels have no classes, which the score needs; use the classifier or Inception")
    if name == ACCURACY and space != "classifier":
        raise InputError(f"the space {space!r} does not have the data's classes, which accuracy needs; use classifier")
    return name


def _accuracy(features, labels):
    """Returns the share of samples that the classifier takes for the class that was asked for."""
    if labels is None or len(labels) != len(features.vectors):
        raise InputError("accuracy needs the class that was asked for of each sample; give labels, one for each")
    return float(np.mean(np.argmax(features.probabilities, axis=1) == labels))


def _figures(metric, reference, features, chosen):
    """Returns the values of a metric, in the order of `figure_names`."""
    fake = features.vectors[_draw(len(features.vectors), MAX_VECTORS)]
    if metric == "prdc":
        return prdc(reference.vectors, fake, chosen.k)
    if metric == "frechet":
        return [frechet_between(reference.moments, moments(features.vectors))]
    if metric == "kernel":
        return kernel_distance(reference.vectors, fake, subset_size=chosen.subset_size)
    if features.probabilities is None:
        space = reference.identity["space"]
        raise InputError(f"the space {space!r} has no classes, which the score needs; use the classifier or Inception")
    return class_score(features.probabilities, chosen.splits)


def too_few(reference: Reference, fake: int) -> str:
    """Returns a sentence to warn with if either set has no more vectors than dimensions, or else "".

    The Frechet distance is then biased up. How much depends on the numbers of vectors, so it can be compared only with
    figures for the same numbers.

    Args:
      reference: the real set.
      fake: number of samples.
    """
    dim, real = len(reference.moments.mean), reference.identity["count"]
    if min(real, fake) > dim:
        return ""
    return (
        f"the Frechet distance of {fake:,} samples to {real:,} real images in {dim:,} dimensions is biased up; "
        f"take more than {dim:,} of each, or compare it only with figures for the same numbers"
    )
