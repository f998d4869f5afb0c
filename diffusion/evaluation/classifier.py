"""Trains a small classifier on the labelled data at hand: a feature space that needs no download.

What it measures depends on its training, so figures can be compared only if the same file judged the samples.
"""

import importlib.metadata
import json
import math
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from diffusion import keys
from diffusion.data import Dataset, batch_indices, fingerprint
from diffusion.errors import InputError, require_range
from diffusion.evaluation.metrics import prdc
from diffusion.files import write_atomically
from diffusion.images import to_floats
from diffusion.interop.safetensors_file import read_header, read_tensors
from diffusion.model import check_finite
from diffusion.sealed import digest

WIDTH = 32
"""Channels of the first stage; each later one has twice as many as the one before, up to four times WIDTH."""

NUM_FEATURES = 128
HELD_OUT = 0.2
"""Share of the data that is kept from training, to measure the accuracy on."""

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
DROPOUT = 0.3
JUDGED = 1000
"""At most so many images of a kind show whether the features tell real images from noise."""

_FORMAT, _ENTRY = "jax-fast-diffusion classifier 2", "classifier"


class Outputs(NamedTuple):
    """Holds what the classifier says of images.

    Attributes:
      features: the last hidden layer, at least 0.
      logits: one for each of the K classes.
    """

    features: Float[Array, "N 128"]
    logits: Float[Array, "N K"]


class Classifier(NamedTuple):
    """Holds a trained classifier and the facts of its training.

    Attributes:
      params: the network's parameters.
      image_shape: (H, W, C) of the images that it judges.
      num_classes: number of classes K.
      accuracy: share of right answers on the images that it was not trained on, 0..1.
      chance: the accuracy of always guessing the most frequent class.
      held_out_precision: precision of those images beside those that it was trained on, 0..1, see `metrics.prdc`.
      noise_precision: the same of uniform noise, which should be 0.
      data: `diffusion.data.fingerprint` of the data that it was trained on.
      seed, epochs: as given to `train`.
    """

    params: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    accuracy: float
    chance: float
    held_out_precision: float
    noise_precision: float
    data: str
    seed: int
    epochs: int

    def sha256(self) -> str:
        """Returns the identity of the parameters, as 64 hex digits."""
        return digest(self.params)

    def doubts(self) -> list[str]:
        """Returns a sentence for each reason not to trust figures in the space of its features."""
        result = []
        if self.accuracy < (1 + self.chance) / 2:
            result.append(
                f"the classifier is right about only {self.accuracy:.1%} of the images that it was not shown, where "
                f"guessing is about {self.chance:.1%}; take more images of each class, or other features"
            )
        if self.noise_precision > 0.5:
            result.append(
                f"the classifier's features give uniform noise a precision of {self.noise_precision:.3f}, and real "
                f"images {self.held_out_precision:.3f}, so that precision and density here do not tell noise from "
                "images; take more images of each class, or other features"
            )
        return result


class Network(nn.Module):
    """Classifies [N, H, W, C] in [-1, 1] by stages of two convolutions, with the size halved until it is at most 4."""

    num_classes: int

    @nn.compact
    def __call__(self, x, dropout_key=None):
        # Convolutions, with the image halved between stages.
        stages = max(1, math.ceil(math.log2(min(x.shape[1:3]) / 4)) + 1)
        for stage in range(stages):
            width = WIDTH * min(2**stage, 4)
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME") if stage else x
            for _ in range(2):
                x = nn.relu(nn.GroupNorm(num_groups=8)(nn.Conv(width, (3, 3), use_bias=False)(x)))

        # The hidden layer whose values are the features, and in training dropout before the logits.
        features = nn.relu(nn.Dense(NUM_FEATURES, name="features")(x.reshape(len(x), -1)))
        kept = features
        if dropout_key is not None:
            kept = jnp.where(jax.random.bernoulli(dropout_key, 1 - DROPOUT, kept.shape), kept / (1 - DROPOUT), 0)
        return Outputs(features, nn.Dense(self.num_classes, name="logits")(kept))


@partial(jax.jit, static_argnames="num_classes")
def apply(params: dict[str, Any], images: UInt8[Array, "N H W C"], num_classes: int) -> Outputs:
    """Returns features and logits of images with pixels 0..255."""
    return Network(num_classes).apply({"params": params}, to_floats(images))


def activations(params: dict[str, Any], images: Float[Array, "N H W C"], num_classes: int) -> tuple[Array, ...]:
    """Returns what each convolution makes of images in [-1, 1], [N, h, w, c] from the first to the last; for losses."""
    _, found = Network(num_classes).apply(
        {"params": params}, images, capture_intermediates=lambda module, _: isinstance(module, nn.GroupNorm)
    )
    kept = found["intermediates"]
    return tuple(nn.relu(kept[name]["__call__"][0]) for name in sorted(kept, key=lambda n: int(n.rpartition("_")[2])))


def vectors(params: dict[str, Any], images: Float[Array, "N H W C"]) -> Float[Array, "N 128"]:
    """Returns the features of images in [-1, 1], which need not be rounded to 8 bits; JAX can differentiate it."""
    return Network(params["logits"]["bias"].shape[0]).apply({"params": params}, images).features


def train(dataset: Dataset, *, epochs: int = 20, seed: int = 0) -> Classifier:
    """Trains a classifier on four fifths of the data, and measures its accuracy on the rest.

    The result depends only on (data, epochs, seed). The digits take seconds on a CPU and give about 99 %; CIFAR-10
    wants a GPU.

    Args:
      dataset: labelled images, held in memory: at least ten, of at least two classes.
      epochs: passes over the training part, at least 1.
      seed: decides the division, the initial parameters, the order and dropout; at least 0.

    Raises:
      InputError: an argument is out of its range, or the data has no labels.
    """
    require_range("epochs", epochs, 1)
    require_range("seed", seed, 0)
    num_classes = len(dataset.class_names)
    if dataset.labels is None or num_classes < 2 or len(dataset.images) < 10:
        raise InputError(
            f"{len(dataset.images)} images of {num_classes} classes cannot train a classifier; it needs at least ten "
            "with labels of two classes: put images in a folder for each class, or use other features"
        )
    order = np.random.default_rng(seed).permutation(len(dataset.images))
    held_out, kept = np.split(order, [math.ceil(HELD_OUT * len(order))])
    params = _fit(dataset, np.sort(kept), num_classes, epochs, seed)
    facts = _judge(params, dataset, np.sort(kept), np.sort(held_out), seed)
    shape = tuple(map(int, dataset.images.shape[1:]))
    return Classifier(params, shape, num_classes, **facts, data=fingerprint(dataset), seed=seed, epochs=epochs)


@keys.pinned
def _fit(dataset, kept, num_classes, epochs, seed):
    batch_size = min(BATCH_SIZE, len(kept))
    steps = max(1, epochs * len(kept) // batch_size)
    start, drop = jax.random.split(keys.make(seed))
    params, state = _init(start, tuple(dataset.images.shape[1:]), num_classes, steps)
    for k in range(steps):
        index = kept[batch_indices(len(kept), batch_size, seed, k)]
        params, state = _step(params, state, dataset.images[index], dataset.labels[index], drop, k, num_classes, steps)
    return jax.device_get(params)


def _optimizer(steps):
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-3)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _init(key, shape, num_classes, steps):
    params = Network(num_classes).init(key, jnp.zeros((1, *shape)))["params"]
    return params, _optimizer(steps).init(params)


@partial(jax.jit, static_argnums=(6, 7), donate_argnums=(0, 1))
def _step(params, state, images, labels, drop, k, num_classes, steps):
    def loss(p):
        logits = Network(num_classes).apply({"params": p}, to_floats(images), jax.random.fold_in(drop, k)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = _optimizer(steps).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def _judge(params, dataset, kept, held_out, seed):
    """Returns how well a classifier knows images that it was not shown, and whether it takes noise for images."""
    num_classes, counts = len(dataset.class_names), np.bincount(dataset.labels)

    def outputs(images, places):
        # In batches of one size, filled up with the last image, so that one compilation serves all.
        parts = []
        for start in range(0, len(places), BATCH_SIZE):
            batch = places[np.minimum(np.arange(start, start + BATCH_SIZE), len(places) - 1)]
            parts.append(jax.device_get(apply(params, images[batch], num_classes)))
        return Outputs(*(np.concatenate(part)[: len(places)] for part in zip(*parts, strict=True)))

    rng = np.random.default_rng(seed)
    seen = outputs(dataset.images, np.sort(rng.permutation(kept)[:JUDGED])).features
    others = outputs(dataset.images, held_out)
    noise = rng.integers(0, 256, (min(JUDGED, len(kept)), *dataset.images.shape[1:]), np.uint8)
    noise = outputs(noise, np.arange(len(noise))).features
    k = min(5, len(seen) - 1, len(others.features) - 1)
    return {
        "accuracy": float((others.logits.argmax(axis=1) == dataset.labels[held_out]).mean()),
        "chance": float(counts.max() / counts.sum()),
        "held_out_precision": prdc(seen, others.features[:JUDGED], k).precision,
        "noise_precision": prdc(seen, noise, k).precision,
    }


def save(path: str | os.PathLike, classifier: Classifier) -> None:
    """Writes the classifier and the facts of its training as one .safetensors file, whole or not at all."""
    arrays = flax.traverse_util.flatten_dict(classifier.params, sep="/")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    facts = {"format": _FORMAT, "sha256": classifier.sha256(), **classifier._asdict()}
    facts["versions"] = versions | {"python": platform.python_version()}
    del facts["params"]
    write_atomically(path, safetensors.numpy.save(arrays, {_ENTRY: json.dumps(facts, sort_keys=True)}))


def load(path: str | os.PathLike) -> Classifier:
    """Reads a classifier that `save` wrote.

    Raises:
      InputError: there is no such file, it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}; train a classifier first")
    header = read_header(path)
    try:
        facts = json.loads(header.metadata.get(_ENTRY, "{}"))
        if facts.get("format") != _FORMAT:
            raise InputError(f"{path} is no classifier of this version; remove it, and train again")
        known = {name: facts[name] for name in Classifier._fields if name != "params"}
        shape, num_classes = tuple(known["image_shape"]), known["num_classes"]
        shares = [known[name] for name in ("accuracy", "chance", "held_out_precision", "noise_precision")]
        if not all(isinstance(n, int) and 1 <= n <= 2**16 for n in (*shape, num_classes)) or len(shape) != 3:
            raise ValueError(f"images of shape {shape}, {num_classes} classes")
        if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
            raise ValueError("a share that is none")
        wanted = jax.eval_shape(Network(num_classes).init, keys.make(0), jnp.zeros((1, *shape)))["params"]
        wanted = flax.traverse_util.flatten_dict(wanted, sep="/")
        if {name: t.shape for name, t in header.tensors.items()} != {name: x.shape for name, x in wanted.items()}:
            raise ValueError("parameters of another network")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({str(error)[:100]}); remove it, and train again") from None
    params = flax.traverse_util.unflatten_dict(read_tensors(path, header.tensors), sep="/")
    if digest(params) != facts.get("sha256"):
        raise InputError(f"{path} is damaged: its parameters are not what was written; remove it, and train again")
    check_finite(params, str(path))
    return Classifier(params=params, **known | {"image_shape": shape})
