"""Caching: a network's deep features are computed in some calls and used again in those between them.

Source: DeepCache, arXiv:2312.00858.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool

from diffusion.errors import InputError
from diffusion.types import Images

Features = Any
"""What a network keeps of a call: a pytree of arrays with leading axis B."""


class Split(NamedTuple):
    """Holds a network as two functions, of which the second leaves out the deep part of the first.

    Attributes:
      whole: (params, x, t, cond) -> (prediction, features), where the prediction is the `ApplyFn`'s.
      shallow: (params, x, t, cond, features) -> prediction, with the deep features of an earlier call.
    """

    whole: Callable[..., tuple[Images, Features]]
    shallow: Callable[..., Images]


@dataclasses.dataclass(frozen=True)
class Cache:
    """Says which network calls of a table compute the deep features; the others take those of the last such call.

    Attributes:
      split: the network, as `Model.split` has it; None is refused. Wrap its functions where apply_fn is wrapped.
      calls: a number k for calls 0, k, 2 k, ...; or the numbers of the calls, ascending from 0.
    """

    split: Split | None
    calls: int | Sequence[int]

    def whole(self, nfe: int) -> Bool[np.ndarray, "calls"]:
        """Returns which of so many calls are computed whole.

        Raises:
          InputError: a network without levels to keep, a table of one call, or numbers that it does not have.
        """
        if self.split is None:
            raise InputError(
                "cache keeps the deep levels of a network, and this one has none to keep; leave it out, or take a UNet "
                "of at least 2 levels or a transformer of at least 3 blocks"
            )
        if not isinstance(self.split, Split):
            raise InputError(
                f"split of cache is a {type(self.split).__name__}; give Model.split, or a Split of your own"
            )
        if not _is_whole(self.calls) and not isinstance(self.calls, list | tuple | range | np.ndarray):
            raise InputError(f"calls of cache are {self.calls!r}; give a whole number, or a list of calls from 0")
        if nfe < 2:
            raise InputError("cache keeps features from call to call, and this table makes one; leave it out")
        if _is_whole(self.calls):
            if not 1 <= self.calls <= nfe:
                raise InputError(f"cache is {self.calls}; this table makes {nfe} calls, so give 1 to {nfe}")
            return np.arange(nfe) % self.calls == 0
        given = list(self.calls)
        if not given or not all(map(_is_whole, given)) or given[0] != 0 or sorted(set(given)) != given:
            raise InputError(f"cache has the calls {_shown(given)}; name each once, in order, and begin with call 0")
        if given[-1] >= nfe:
            raise InputError(f"cache names call {given[-1]}; the calls of this table are 0 to {nfe - 1}")
        return np.isin(np.arange(nfe), given)


def _is_whole(number):
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def _shown(numbers):
    return ",".join(map(str, numbers)) or "()"


def cached(split: Split, whole: Bool[Array, ""], features: Features | None) -> Callable[..., tuple[Images, Features]]:
    """Returns a network (params, x, t, cond) -> (prediction, features) for one call.

    Only the branch that `whole` picks is computed, except under vmap, where JAX computes both.

    Args:
      split: the network.
      whole: whether this call computes the deep features.
      features: those of the call before; None for a call that is whole in any case.
    """

    def network(params, x, t, cond):
        if features is None:
            return split.whole(params, x, t, cond)
        return jax.lax.cond(
            whole,
            lambda: split.whole(params, x, t, cond),
            lambda: (split.shallow(params, x, t, cond, features), features),
        )

    return network
