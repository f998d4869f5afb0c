"""Guidance: how a network's answer for a condition is pushed away from its answer for none.

A rule is one function of a `Pair` of answers and a scale; `RULES` names them. Scale, interval and rescaling are common
to all rules and compose with each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from diffusion import options
from diffusion.errors import InputError, require_range
from diffusion.types import ApplyFn, Images, Params

Scalar = Float[Array, ""]


@struct.dataclass
class Guidance:
    """What to guide a network with. A pytree; the rule, the interval and the second network's function are static.

    Attributes:
      scale: w, where 1 is no guidance: a number, one number for each network call, or a function of the time t.
      null: the condition that means "none", shaped as cond.
      interval: (low, high), guides only where low <= t <= high (arXiv:2404.07724); None guides everywhere.
      rescale: 0..1, how far to bring the spread of the guided output back to that of the conditional one
        (arXiv:2305.08891); 0.7 is usual.
      rule: a key of `RULES`, with options after a colon: "apg:eta=0,norm=15".
      reference_fn, reference_params: a second, weaker network, which takes the place of "the network without its
        condition" (autoguidance, arXiv:2406.02507). It predicts what the network predicts, on the same schedule, and
        is given null, or cond where there is no null; a model without conditions can be guided in this way.
      reference_split: the second network as `Model.split` has it, where a cache serves both.
    """

    scale: Any = 1.0
    null: Any = None
    interval: tuple[float, float] | None = struct.field(pytree_node=False, default=None)
    rescale: Any = 0.0
    rule: str = struct.field(pytree_node=False, default="cfg")
    reference_fn: ApplyFn | None = struct.field(pytree_node=False, default=None)
    reference_params: Params = None
    reference_split: Any = struct.field(pytree_node=False, default=None)

    def acts(self) -> bool:
        """Whether it changes anything, and so is worth the second answer."""
        at_one = not isinstance(self.scale, jax.core.Tracer) and not callable(self.scale) and np.all(self.scale == 1)
        return not at_one or self.rule.partition(":")[0] in ACT_AT_ONE

    def check(self, cond: Any, acts: bool = True) -> None:
        """Raises InputError for what cannot be: an unknown rule or option, a value out of its range, wrong conditions.

        Args:
          cond: the conditions that will be given to the network.
          acts: whether the guidance acts, and so needs conditions.
        """
        _try(options.parse("guidance_rule", self.rule, RULES, leading=2))
        concrete = [v for v in (self.scale, self.rescale) if not callable(v) and not isinstance(v, jax.core.Tracer)]
        if not all(np.all(np.isfinite(v)) for v in concrete):
            raise InputError(f"guidance_scale is {self.scale} and guidance_rescale {self.rescale}; both must be finite")
        if not isinstance(self.rescale, jax.core.Tracer):
            require_range("guidance_rescale", float(self.rescale), 0, 1)
        if self.interval is not None and not (np.shape(self.interval) == (2,) and self.interval[0] <= self.interval[1]):
            raise InputError(f"guidance_interval is {self.interval}; give (low, high) in timesteps")
        if self.reference_fn is None and self.reference_params is not None:
            raise InputError("guidance has reference_params without a reference_fn; give both, or neither")
        if not acts:
            return
        if self.reference_fn is None and (cond is None or self.null is None):
            raise InputError("guidance needs a class-conditional model: give cond and null_cond, or guidance_scale 1")
        if self.null is not None and jax.tree.map(jnp.shape, cond) != jax.tree.map(jnp.shape, self.null):
            raise InputError("cond and null_cond differ in structure or shape; give one null for each condition")

    def scales(self, t: Float[Array, "calls"]) -> tuple[Float[Array, "calls"], Float[Array, "calls"]]:
        """Returns the scale at the time of each network call, and 1 where the interval allows guidance, else 0."""
        scale = self.scale(t) if callable(self.scale) else self.scale
        if jnp.shape(scale) not in ((), t.shape):
            raise InputError(
                f"guidance scale has {jnp.size(scale)} numbers; this table makes {t.size} network calls: give one "
                "number for all, or one for each"
            )
        low, high = self.interval or (-np.inf, np.inf)
        inside = (t >= low) & (t <= high)
        if not isinstance(t, jax.core.Tracer) and not np.any(inside):
            raise InputError(
                f"guidance_interval is {self.interval}; it holds none of this sampler's times, {t[-1]:g} to {t[0]:g}"
            )
        return scale * np.ones(t.shape), 1.0 * inside


class Now(NamedTuple):
    """Holds what guidance needs in one network call.

    Attributes:
      guidance: what was asked for, over all calls.
      scale, inside: of this call, see `Guidance.scales`.
      index: the number of this call, from 0.
      memory: what the rule kept of the calls before; zeros at first, shaped as x.
    """

    guidance: Guidance
    scale: Scalar
    inside: Scalar
    index: Scalar
    memory: Images


class Pair(NamedTuple):
    """Holds what a rule is given in one network call.

    Outputs are in the network's own terms: eps, v, or whatever it predicts. A rule that mixes them linearly is the same
    for every prediction; one that measures lengths or angles is not, unless it does so in estimates of x_0.

    Attributes:
      output: the network's answer for the condition.
      reference: its answer for no condition, or the weaker network's.
      x0: output -> the estimate of x_0 that it stands for.
      x0_per_output: the derivative of that, a number.
      index, memory: as in `Now`.
    """

    output: Images
    reference: Images
    x0: Callable[[Images], Images]
    x0_per_output: Scalar
    index: Scalar
    memory: Images


class Guided(NamedTuple):
    """Holds what a rule returns.

    Attributes:
      output: the guided output.
      for_eps: the output whose eps the solver goes on with; None for the guided one.
      memory: what the rule will be given in the next call; None leaves it as it is.
    """

    output: Images
    for_eps: Images | None = None
    memory: Images | None = None


def cfg(pair: Pair, scale: Scalar) -> Guided:
    """Classifier-free guidance (arXiv:2207.12598, whose w is ours less 1): from the reference past the output."""
    return Guided(mix(pair.output, pair.reference, scale))


def mix(output: Images, reference: Images, scale: Scalar | Images) -> Images:
    """Returns the guided output, past the reference by the scale; one for all samples, or one that broadcasts to x."""
    return reference + scale * (output - reference)


def cfg_plus_plus(pair: Pair, scale: Scalar) -> Guided:
    """CFG++ (arXiv:2406.08070): the guided estimate of x_0, but the eps of the output without the condition.

    With one-step tables, as of ddim and euler_ancestral, this is the paper's sampler. With a table that keeps earlier
    estimates it is another method than the authors': x is moved so that its eps is the unconditional one, and the
    estimates kept are the guided ones, where their DPM-Solver++(2M) takes the difference of the guided estimate from
    the last unconditional one.
    """
    return cfg(pair, scale)._replace(for_eps=pair.reference)


def apg(pair: Pair, scale: Scalar, eta: float = 0.0, norm: float = 15.0, momentum: float = -0.5) -> Guided:
    """Adaptive projected guidance (arXiv:2410.02416, Algorithm 1), which saturates less at a large scale.

    The difference between the two estimates of x_0 is averaged over the calls and shortened, and then loses the part
    that points along the conditional estimate.

    Args:
      pair, scale: as for every rule.
      eta: the share of that part which stays; 1 keeps all of it.
      norm: the largest Euclidean norm that the difference may have in one sample; 0 allows any. A good value depends on
        the size of a sample: the paper takes 15 for Stable Diffusion XL, and 2.5 for ImageNet in EDM2's latents.
      momentum: how much of the average so far is added to the difference in this call; a negative one pushes away from
        where the calls before have pushed.
    """
    require_range("eta of guidance rule apg", eta, 0, 1)
    require_range("norm of guidance rule apg", norm, 0)
    require_range("momentum of guidance rule apg", momentum, -1, 1, open_ends="low, high")
    estimate = pair.x0(pair.output)
    difference = pair.x0_per_output * (pair.output - pair.reference) + momentum * pair.memory
    update = difference
    if norm > 0:
        update = update * jnp.minimum(1, norm / jnp.sqrt(jnp.maximum(_dot(update, update), 1e-24)))
    along = _dot(update, estimate) / jnp.maximum(_dot(estimate, estimate), 1e-12) * estimate
    update = update - (1 - eta) * along
    guided = pair.output + (scale - 1) * update / pair.x0_per_output
    return Guided(guided, memory=difference)


def cfg_zero(pair: Pair, scale: Scalar, zero_init: int = 0) -> Guided:
    """CFG-Zero* (arXiv:2503.18886, Algorithm 1): the reference is first scaled to fit the conditional output best.

    Args:
      pair, scale: as for every rule.
      zero_init: how many network calls, from the first, get the output 0. That leaves x where it is if the network
        predicts a flow and estimates are not clipped, and is meant for such models. The paper does so in the first 4 %
        of the calls.
    """
    require_range("zero_init of guidance rule cfg_zero", zero_init, 0)
    fit = _dot(pair.output, pair.reference) / jnp.maximum(_dot(pair.reference, pair.reference), 1e-12)
    guided = cfg(pair._replace(reference=fit * pair.reference), scale).output
    guided = jnp.where(pair.index < zero_init, 0, guided)
    return Guided(guided)


RULES: dict[str, Callable[..., Guided]] = {
    "cfg": cfg,
    "cfg++": cfg_plus_plus,
    "apg": apg,
    "cfg_zero": cfg_zero,
}
"""Functions (pair, scale, options) -> Guided. The parameters after the first two are options; the type of a default is
the type that its text is read as, so that a real number wants a default such as 1.0."""

ACT_AT_ONE = ("cfg++",)
"""The rules that change something at a scale of 1, too; the others are not called there."""


def guide(now: Now, pair: Pair) -> Guided:
    """Applies the rule, then rescales; outside the interval the conditional output stays as it is."""
    rule = options.parse("guidance_rule", now.guidance.rule, RULES, leading=2)
    guided = rule.function(pair, now.scale, **rule.options)
    rescale = jnp.asarray(now.guidance.rescale, pair.output.dtype)
    # Guidance widens the output; rescaling brings its spread back (arXiv:2305.08891, Eq. 15-16).
    ratio = _spread(pair.output) / jnp.maximum(_spread(guided.output), 1e-12)
    rescaled = guided.output * (rescale * ratio + (1 - rescale))
    inside = now.inside > 0
    output = jnp.where(inside, rescaled, pair.output)
    for_eps = None if guided.for_eps is None else jnp.where(inside, guided.for_eps, pair.output)
    return Guided(output, for_eps, now.memory if guided.memory is None else guided.memory)


def _try(choice):
    """Has a rule look at its options, by tracing it on nothing, so that it refuses them before any work is done."""
    x = jnp.zeros((1, 1))
    pair = Pair(x, x, lambda output: output, jnp.ones(()), jnp.zeros((), int), x)
    jax.eval_shape(lambda: choice.function(pair, jnp.ones(()), **choice.options).output)


def _dot(a, b):
    """Returns the inner product of each sample, [B, 1, ...]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _spread(x):
    """Returns the standard deviation of each sample, [B, 1, ...]; its gradient is 0 where x is constant."""
    return jnp.sqrt(jnp.maximum(jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True), 1e-24))
