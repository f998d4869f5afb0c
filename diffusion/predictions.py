"""What a network predicts: one table, from which reading, training and weighting follow.

A prediction is a pair (c, e) of functions of the signal a and the noise n: the network learns F = c x_0 + e eps. With
x = a x_0 + n eps that gives

    x_0 = (e x - n F) / (e a - n c),

the training target is F itself, and an error in F is |e a - n c| / n times the error in the x_0 that it stands for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.errors import InputError, nearest
from diffusion.types import Images

SIGMA_DATA = 0.5
"""EDM's standard deviation of the data, for pixels in [-1, 1]."""

Level = Float[Array, "..."] | Float[np.ndarray, "..."] | float
"""The signal a or the noise n at some noise levels, of any one shape."""


class Prediction(NamedTuple):
    """One kind of prediction.

    Attributes:
      pair: (a, n) -> (c, e), finite for every a and n in 0..1 and beyond, also where one of them is 0. Both are Python
        floats, NumPy or JAX arrays; a coefficient that is always 0 is best written as 0.0, which drops its term.
      input_scale: (a, n) -> what x is multiplied by before the network sees it; None for 1.
      sees_log_sigma: whether the network is given log(n / a) / 4 for its time, as EDM's is, and not t.
      sees_end: whether the network is also given the time s that a step goes to; its time is then [B, 2], t and s.
    """

    pair: Callable[[Level, Level], tuple[Level, Level]]
    input_scale: Callable[[Level, Level], Level] | None = None
    sees_log_sigma: bool = False
    sees_end: bool = False


def _edm_spread(a, n):
    """The standard deviation of x for data of standard deviation `SIGMA_DATA`."""
    return (n**2 + (a * SIGMA_DATA) ** 2) ** 0.5


def _edm_pair(a, n):
    """F of EDM (arXiv:2206.00364, table 1), whose sigma is n / a: D = c_skip (x / a) + c_out F, solved for F."""
    spread = _edm_spread(a, n)
    return n / (SIGMA_DATA * spread), -a * SIGMA_DATA / spread


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(lambda a, n: (0.0, 1.0)),
    "x0": Prediction(lambda a, n: (1.0, 0.0)),
    "v": Prediction(lambda a, n: (-n, a)),
    "flow": Prediction(lambda a, n: (-1.0, 1.0)),
    "edm": Prediction(_edm_pair, input_scale=lambda a, n: 1 / _edm_spread(a, n), sees_log_sigma=True),
    "mean_flow": Prediction(lambda a, n: (-1.0, 1.0), sees_end=True),
}
"""The noise; the image; v = a eps - n x_0; the velocity eps - x_0 of a rectified flow; EDM's F; and that velocity's
mean over the times from t down to s, with which a DDIM step goes from x_t to x_s exactly (arXiv:2505.13447)."""


class Reading(NamedTuple):
    """How a network is asked and read at some noise levels: x_0 = from_x x + from_output network(input_scale x, time).

    Each field has one entry for each level, or is a scalar.

    Attributes:
      signal, noise: a and n.
      from_x, from_output, input_scale: as in the formula.
      time: what the network is given for its time.
      end: the time that the step goes to, for a network that sees it; None for any other.
    """

    signal: Float[Array, "*levels"]
    noise: Float[Array, "*levels"]
    from_x: Float[Array, "*levels"]
    from_output: Float[Array, "*levels"]
    input_scale: Float[Array, "*levels"]
    time: Float[Array, "*levels"]
    end: Float[Array, "*levels"] | None = None

    def astype(self, dtype: Any) -> "Reading":
        """Casts every field but the times, which keep their precision: bfloat16 cannot tell t = 857 from 856."""
        return self.with_levels(lambda field: jnp.asarray(field, dtype))

    def with_levels(self, change: Callable[[Any], Any]) -> "Reading":
        """Changes every field but the times."""
        return Reading(*map(change, self[:5]), self.time, self.end)


def sees_end(prediction: str) -> bool:
    """Tells whether a network of this prediction is told the time that a step goes to, besides that where it begins."""
    return PREDICTIONS[prediction].sees_end


def check_known(prediction: str, what: str = "prediction") -> None:
    """Raises InputError, which calls the prediction what, unless it is a key of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise InputError(f"{what} is {prediction!r}; {nearest(str(prediction), PREDICTIONS)}")


def reading(prediction: str, t: Level, a: Level, n: Level, end: Level | None = None) -> Reading:
    """Says how to ask and read a network at noise levels; NumPy in, NumPy out, and JAX likewise.

    Args:
      prediction: a key of `PREDICTIONS`.
      t, a, n: time, signal and noise, of one shape.
      end: the time that the step goes to, for a prediction that sees it.

    Returns:
      The reading; not finite where the prediction says nothing about x_0, as that of eps where a = 0.
    """
    kind, xp = PREDICTIONS[prediction], _numpy_of(a)
    c, e = (xp.asarray(part + 0 * a) for part in kind.pair(a, n))
    # Where e is 0, F is a multiple of x_0 and says nothing about x; the formula would be 0 / 0 at n = 0.
    alone = e == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        determinant = xp.where(alone, 1, e * a - n * c)
        from_x = xp.where(alone, 0, e / determinant)
        from_output = xp.where(alone, 1 / xp.where(alone, c, 1), -n / determinant)
        time = _time(kind, t, a, n)
    scale = 1 + 0 * a if kind.input_scale is None else kind.input_scale(a, n)
    return Reading(a, n, from_x, from_output, scale, time, end if kind.sees_end else None)


def inputs(prediction: str, t: Level, a: Level, n: Level, x: Images) -> tuple[Images, Level]:
    """Returns what the network is given for x and for its time; t is [B], and a and n broadcast to x."""
    kind = PREDICTIONS[prediction]
    scaled = x if kind.input_scale is None else kind.input_scale(a, n) * x
    return scaled, _time(kind, t, *(level.reshape(-1) for level in (a, n)))


def target(prediction: str, a: Level, n: Level, x_0: Images, eps: Images) -> Images:
    """Returns F = c x_0 + e eps, what the network learns to predict; a and n broadcast to the images."""
    weighted = zip(PREDICTIONS[prediction].pair(a, n), (x_0, eps), strict=True)
    # A literal zero drops its term: 0 * x_0 would cost a pass over the images.
    return sum(weight * part for weight, part in weighted if not (isinstance(weight, float) and weight == 0))


def error_ratio(prediction: str, a: Level, n: Level) -> Level:
    """Returns the error in F over the error in the x_0 that it stands for, |e a - n c| / n, at a fixed x and n > 0."""
    c, e = PREDICTIONS[prediction].pair(a, n)
    return _numpy_of(a).abs(e * a - n * c) / n


def check_signal(name: str, prediction: str, t: Level, a: Level, n: Level) -> None:
    """Raises InputError if the prediction says nothing about x_0 at one of the levels of what is called name.

    Args:
      name: what goes through these levels, for the error.
      prediction: a key of `PREDICTIONS`.
      t, a, n: concrete times, signals and noises.
    """

    def useful(kind):
        return all(np.all(np.isfinite(field)) for field in reading(kind, *map(np.asarray, (t, a, n)))[:6])

    if not useful(prediction):
        others = ", ".join(kind for kind in PREDICTIONS if useful(kind) and not sees_end(kind))
        raise InputError(
            f"{name} starts at zero signal, where {prediction} says nothing about x_0; use a model that predicts one "
            f"of {others}, or start lower"
        )


def _time(kind, t, a, n):
    """Returns what a network of this kind is given for its time."""
    return _numpy_of(a).log(n / a) / 4 if kind.sees_log_sigma else t


def _numpy_of(a):
    return jnp if isinstance(a, jax.Array) else np
