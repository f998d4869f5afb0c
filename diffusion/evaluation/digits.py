"""How good samples of the 8x8 digits are, judged without any trained network of ours.

The pixels themselves, scaled to [0, 1], are the features, so the distance here is no FID.
"""

import contextlib
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC

from diffusion.data import Dataset
from diffusion.evaluation.frechet import frechet_distance


class DigitScores(NamedTuple):
    """Scores of a set of samples.

    Attributes:
      frechet: Frechet distance on the 64 pixels to all real digits.
      mean_top_probability: of an SVC with calibrated probabilities, trained on all real digits.
      class_shares: share of the samples in each of the ten classes.
    """

    frechet: float
    mean_top_probability: float
    class_shares: tuple[float, ...]


def score(samples: UInt8[np.ndarray, "N 8 8 1"], real: Dataset) -> DigitScores:
    """Scores samples against the real digits."""
    features, reference = pixels(samples), pixels(real.images)
    with _quiet():
        probabilities = _classifier().fit(reference, real.labels).predict_proba(features)
    return _scores(frechet_distance(features, reference), probabilities)


def reference_scores(real: Dataset) -> DigitScores:
    """What real digits score: two random halves against each other; probabilities by 5-fold cross-validation."""
    features = pixels(real.images)
    order = np.random.default_rng(0).permutation(len(features))
    half = len(order) // 2
    with _quiet():
        probabilities = cross_val_predict(_classifier(), features, real.labels, method="predict_proba")
    return _scores(frechet_distance(features[order[:half]], features[order[half:]]), probabilities)


def pixels(images: UInt8[np.ndarray, "N 8 8 1"]) -> Float[np.ndarray, "N 64"]:
    """One row an image, in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


def _scores(frechet, probabilities):
    shares = np.bincount(probabilities.argmax(axis=1), minlength=10) / len(probabilities)
    return DigitScores(frechet, float(probabilities.max(axis=1).mean()), tuple(shares.tolist()))


def _classifier():
    # libsvm's pairwise coupling; its announced successor calibrates each class alone and is surer of everything.
    return SVC(probability=True, random_state=0)


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `probability` parameter was deprecated", FutureWarning)
        yield
