"""Noise by time and not by stage: other numbers of steps then follow the same Brownian path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from diffusion import keys
from diffusion.errors import InputError
from diffusion.solvers.table import SamplerTable
from diffusion.types import Images

PATH = 2**32 - 1
"""What is folded into a sample's key for its path; a table has no stage of this number."""


@struct.dataclass
class Brownian:
    """Draws a table's noise from a Brownian path W for each sample, which runs from time `horizon` to 0.

    The noise of the step from t to s is (W(s) - W(t)) / |t - s|^(1/2). It is standard normal and independent from step
    to step, so that the samples of a table have the distribution that they have without, whatever its weights. But half
    as many steps see the same path: with steps enough both make the same image, as is wanted to see what the number of
    steps does to one. k-diffusion's BrownianTreeNoiseSampler does the same, and counts time as sigma, by default; here
    it is t, in which the noise of a variance-preserving process is even.

    W is halved from its end down to intervals of horizon / 2^depth (Lévy's construction), each half with a key of its
    own, so that it is never stored. Times are rounded to these intervals.

    Attributes:
      horizon: T of the noise schedule.
      depth: how often W is halved: this many draws of noise for each network call. 1..30.
    """

    horizon: Any
    depth: int = struct.field(pytree_node=False, default=16)

    def check(self) -> None:
        """Raises InputError for a horizon that is no finite number above 0, or a depth outside 1..30."""
        traced = isinstance(self.horizon, jax.core.Tracer)
        if not traced and (np.ndim(self.horizon) or not 0 < self.horizon < np.inf):
            raise InputError(f"horizon of the noise is {self.horizon}; give T of the noise schedule")
        if self.depth not in range(1, 31):
            raise InputError(f"depth of the noise is {self.depth}; it must be a whole number in 1..30")

    def intervals(self, table: SamplerTable) -> Int[Array, "stages 2"]:
        """Returns between which places on the path each stage draws its noise: whole numbers in 0..2^depth.

        A stage that draws noise draws that of the way from where the last such stage ended to the time of the next
        call, so that a step of several calls has the noise of its whole length. The others have intervals of length 0.

        Raises:
          InputError: no stage draws noise, a stage draws noise on the way up, or on a way that is too short.
        """
        traced = any(isinstance(v, jax.core.Tracer) for v in (table.t, table.tau, table.update, self.horizon))
        xp = jnp if traced else np
        draws = xp.any(table.update[:, :, -1] != 0, axis=1)
        times = xp.concatenate([table.t[1:], table.tau[-1:]])
        parts = 2**self.depth
        ends = xp.round((1 - times / self.horizon) * parts).astype(np.int32)
        first = xp.round((1 - table.tau[:1] / self.horizon) * parts).astype(np.int32)
        highest = np.maximum.accumulate if xp is np else jax.lax.cummax
        reached = highest(xp.concatenate([first, xp.where(draws, ends, first)]))
        begins, ends = reached[:-1], xp.where(draws, ends, reached[:-1])
        if not traced:
            self._check(table, draws, begins, ends)
        return xp.stack([begins, ends], axis=1)

    def _check(self, table: SamplerTable, draws: Bool[np.ndarray, "stages"], begins, ends) -> None:
        if not 0 <= table.tau[0] <= self.horizon:
            raise InputError(f"tau starts at {table.tau[0]:g}, and the noise at {self.horizon:g}; give T as horizon")
        if not draws.any():
            raise InputError(f"{table.name} draws no noise in its steps, so none can be brownian; give it an eta")
        if np.any(ends[draws] <= begins[draws]):
            at = table.t[draws][np.argmax(ends[draws] <= begins[draws])]
            raise InputError(
                f"{table.name} draws noise at t = {at:g} for no time of its own, and so not from one brownian path; "
                "take fewer steps, or noise that is that of a step down, as of ddim with an eta and no corrector"
            )

    def value(self, key: jax.Array, place: Int[Array, ""], shape: tuple[int, ...]) -> Images:
        """Returns W at a place in 0..2^depth, in units in which its variance is the place; float32 or float64."""
        size = 2**self.depth
        dtype = jnp.result_type(float)

        def halve(level, ends):
            start, length, low, high = ends
            # A node has the number that it has in a heap; the middle is normal around the mean of the ends.
            node = jnp.left_shift(1, level) + start // length
            half = length // 2
            scale = jnp.sqrt(length.astype(dtype)) / 2
            middle = (low + high) / 2 + scale * keys.normal(jax.random.fold_in(key, node), shape, dtype)
            right = place >= start + half
            return (
                jnp.where(right, start + half, start),
                half,
                jnp.where(right, middle, low),
                jnp.where(right, high, middle),
            )

        end = size**0.5 * keys.normal(jax.random.fold_in(key, 0), shape, dtype)
        begin = (jnp.int32(0), jnp.int32(size), jnp.zeros(shape, dtype), end)
        *_, low, high = jax.lax.fori_loop(0, self.depth, halve, begin)
        return jnp.where(place == size, high, low)

    def step(self, sample_keys: jax.Array, interval: Int[Array, "2"], old: Images, dtype: Any) -> tuple[Images, Images]:
        """Returns the standard normal noise of an interval for each sample, and W at its end.

        Args:
          sample_keys: of the samples, [N].
          interval: a row of `intervals`.
          old: W where it begins, [N, *shape].
          dtype: of the noise.
        """
        new = self.at(sample_keys, interval[1], old.shape[1:])
        length = jnp.maximum(interval[1] - interval[0], 1).astype(new.dtype)
        return ((new - old) / jnp.sqrt(length)).astype(dtype), new

    def at(self, sample_keys: jax.Array, place: Int[Array, ""], shape: tuple[int, ...]) -> Images:
        """Returns W of each sample at a place, [N, *shape]."""
        return jax.vmap(lambda key: self.value(jax.random.fold_in(key, np.uint32(PATH)), place, shape))(sample_keys)
