"""An adaptive solver, which is no table: each sample takes the steps that its own error asks for."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion import keys, predictions
from diffusion.denoiser import denoise
from diffusion.errors import InputError, is_whole, require_range
from diffusion.guidance import Guidance, Now
from diffusion.schedules import NoiseSchedule
from diffusion.solvers.forms import eps_levels
from diffusion.types import Images

SAFETY = 0.81
"""A step is taken where the next could be as long as this share of it, which allows an error a little above 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptive:
    """What `adaptive` returns, for the place of a table in `diffusion.sample`.

    Attributes:
      name: what to call it.
      schedule: the noise schedule.
      tau: (start, 0).
      order, rtol, atol, h_init, end, max_calls: see `adaptive`; end is a time here.
      log_variance, start, facts: as those of a solver's table.
    """

    name: str
    schedule: NoiseSchedule
    tau: Float[np.ndarray, "2"]
    order: int
    rtol: float
    atol: float
    h_init: float
    end: float
    max_calls: int
    log_variance: ClassVar[None] = None
    start: ClassVar[None] = None
    facts: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def t(self) -> Float[np.ndarray, "2"]:
        """Returns the times of the first and the last call."""
        return np.array([self.tau[0], self.end])

    @property
    def signal(self) -> Float[np.ndarray, "2"]:
        """Returns a at these times."""
        return self.schedule.at(self.t)[0]

    @property
    def noise(self) -> Float[np.ndarray, "2"]:
        """Returns n at these times."""
        return self.schedule.at(self.t)[1]

    @property
    def start_std(self) -> Float[np.ndarray, ""]:
        """Returns the standard deviation of the noise that the network sees first."""
        return np.hypot(self.signal[0], self.noise[0])

    def __str__(self) -> str:
        return f"{self.name}: up to {self.max_calls:,} network calls, from t = {self.tau[0]:g} to {self.end:g}"


def adaptive(
    schedule: NoiseSchedule,
    tau: Sequence[float],
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    end: float = 0.001,
    max_calls: int = 1000,
) -> Adaptive:
    """Chooses its steps itself: DPM-Solver-12 or -23, each sample with its own error (arXiv:2206.00927, Appendix C).

    A step tries two methods, of order `order` - 1 and `order`, that share their calls. Their difference in units of the
    signal, over max(atol, rtol |x|), root mean square over a sample, is the error; the next step is longer by its
    power -1 / order, as k-diffusion's `sample_dpm_adaptive` has it, and a step whose error is too large is made again.
    A step costs `order` calls. At the end one more call gives the sample, its estimate of x_0.

    All samples of a batch go on until the last is done, and a batch so costs what its slowest sample does; but none
    changes another's steps. `diffusion.sample` with return_trajectory also returns the calls that each sample took.

    Args:
      schedule: the noise schedule.
      tau: a grid, of which only the start counts.
      order: 2 or 3.
      rtol, atol: how large an error may be, relative and absolute, at least 0 and not both 0.
      h_init: the first step in lambda = log(a / n), above 0.
      end: where the steps end, as a share of T.
      max_calls: a sample that is not done after so many calls is NaN.

    Raises:
      InputError: a number out of its range, tau is no grid, or it starts at zero signal, where lambda is -inf.
    """
    if order not in (2, 3):
        raise InputError(f"order is {order}; it must be 2 or 3")
    require_range("rtol", rtol, 0)
    require_range("atol", atol, 0)
    if rtol == atol == 0 or not math.isfinite(rtol + atol):
        raise InputError("rtol and atol must be finite, and one of them above 0, or no step is short enough")
    require_range("h_init", h_init, 0, 100, open_ends="low")
    if not is_whole(max_calls) or max_calls <= order:
        raise InputError(f"max_calls is {max_calls}; it must be a whole number above {order}")
    first = eps_levels("adaptive", schedule, tau)[0]
    require_range("end", end, 0, first.t / schedule.num_timesteps, open_ends="low, high")
    if schedule.variance_preserving and schedule.alpha_bar[-1] == 0:
        raise InputError("adaptive needs a schedule with some signal at T; take a solver with its own steps")
    name = f"adaptive(order={order}, rtol={rtol:g}, atol={atol:g})"
    ends = np.array([first.t, 0.0])
    time = end * schedule.num_timesteps
    return Adaptive(name, schedule, ends, order, rtol, atol, h_init, time, int(max_calls))


ADAPTIVE = {"adaptive": adaptive}
"""Adaptive solvers by name; they take what solvers take, and return no table."""


class _Numbers(NamedTuple):
    """An adaptive solver as the loop reads it; another start or tolerance compiles nothing."""

    start: Any
    end: Any
    rtol: Any
    atol: Any
    h_init: Any
    max_calls: Any
    knots: Float[np.ndarray, "T+1"]
    between: tuple[np.ndarray, np.ndarray] | None


def check_alone(prediction: str, guidance: Guidance | None, **others: Any) -> None:
    """Raises InputError for what counts the calls of a table, or keeps something from one to the next.

    Args:
      prediction, guidance: as `diffusion.sample` has them.
      others: arguments of `diffusion.sample` that go with tables only.
    """
    for name, value in others.items():
        if value is not None:
            raise InputError(f"{name} is for tables, whose calls are known before they are made; leave it out")
    if predictions.sees_end(prediction):
        raise InputError(
            f"a network that predicts {prediction} goes from one time to the next; take ddim, not adaptive"
        )
    if guidance is None:
        return
    if callable(guidance.scale) or np.ndim(guidance.scale) or guidance.rule.partition(":")[0] != "cfg":
        raise InputError(
            "an adaptive solver makes calls that it takes back, and so takes guidance of rule cfg and one scale; leave "
            "out what changes from call to call"
        )


def solve(solver: Adaptive, asked: Any, prediction: str) -> tuple[Images, Int[Array, "N"]]:
    """Returns samples and the network calls that each took.

    Args:
      solver: the solver.
      asked: what `diffusion.sample` gives to every call.
      prediction: what the network predicts.
    """
    schedule = solver.schedule
    numbers = (solver.rtol, solver.atol, solver.h_init, solver.max_calls)
    if schedule.variance_preserving:
        knots, between = -np.log1p(-schedule.noise_var), None
    else:
        between = np.sqrt(schedule.alpha_bar), np.sqrt(schedule.noise_var)
        with np.errstate(divide="ignore"):
            knots = between[1] / between[0]
    lambdas = schedule.half_log_snr(solver.t)
    return _solve(_Numbers(*lambdas, *numbers, knots, between), asked, prediction, solver.order)


@partial(jax.jit, static_argnames=("prediction", "order"))
@keys.pinned
def _solve(solver: _Numbers, asked: Any, prediction: str, order: int):
    dtype = jnp.result_type(float) if asked.x_init is None else asked.x_init.dtype
    shape, rest = asked.sample_shape, (asked.cond, None if asked.guidance is None else asked.guidance.null, asked.known)

    def one(sample_id, x, rest):
        cond, null, known = jax.tree.map(lambda leaf: leaf[None], rest)
        if x is None:
            key = jax.random.fold_in(jax.random.fold_in(asked.key, sample_id), 0)
            x = asked.start_std.astype(dtype) * keys.normal(key, shape, dtype)

        def estimate(y, half_log_snr):
            """Returns D and eps of y = x / a; the network is asked about x."""
            t, a, n = _level(solver, half_log_snr)
            now = None
            if asked.guidance is not None:
                low, high = asked.guidance.interval or (-np.inf, np.inf)
                inside = 1.0 * ((t >= low) & (t <= high))
                guidance = asked.guidance.replace(null=null)
                now = Now(guidance, guidance.scale, inside, jnp.int32(0), jnp.zeros((1, *shape), dtype))
            reading = predictions.reading(prediction, t, a, n).astype(dtype)
            network = partial(asked.apply_fn, asked.params)
            x = (a * y)[None].astype(dtype)
            d = denoise(network, x, cond, reading, asked.options, now, known, asked.steering)
            return d.x0[0], ((d.x - a * d.x0) / n)[0].astype(dtype)

        return _steps(solver, order, estimate, x)

    axes = (0, None if asked.x_init is None else 0, 0)
    return jax.vmap(one, in_axes=axes)(asked.sample_ids, asked.x_init, rest)


class _State(NamedTuple):
    """Where one sample is: y = x / a, the y of lower order of the last step, the next step, and the calls so far."""

    half_log_snr: Array
    step: Array
    y: Array
    lower: Array
    calls: Array


def _steps(solver, order, estimate, x):
    """Makes the steps of one sample, and returns it with the calls that it took."""
    top = jnp.asarray(solver.end)

    def unfinished(state):
        return (state.half_log_snr < top - 1e-5) & (state.calls + order < solver.max_calls)

    def attempt(state):
        to = jnp.minimum(top, state.half_log_snr + state.step)
        lower, higher = _pair(order, lambda y, at: estimate(y, at)[1], state.y, state.half_log_snr, to)
        scale = jnp.maximum(solver.atol, solver.rtol * jnp.maximum(jnp.abs(lower), jnp.abs(state.lower)))
        error = jnp.sqrt(jnp.mean(((lower - higher) / scale) ** 2))
        factor = 1 + jnp.arctan((1 / (error + 1e-8)) ** (1 / order) - 1)
        found = _State(to, state.step, higher, lower, state.calls)
        taken = jax.tree.map(lambda new, old: jnp.where(factor >= SAFETY, new, old).astype(old.dtype), found, state)
        return taken._replace(step=state.step * factor, calls=state.calls + order)

    begin = jnp.asarray(solver.start)
    y = (x / _level(solver, begin)[1]).astype(x.dtype)
    last = jax.lax.while_loop(unfinished, attempt, _State(begin, 1.0 * solver.h_init, y, y, jnp.int32(0)))
    x0, _ = estimate(last.y, last.half_log_snr)
    return jnp.where(last.half_log_snr < top - 1e-5, jnp.nan, x0), last.calls + 1


def _pair(order, eps_at, y, begin, to):
    """Makes a step of DPM-Solver of order `order` - 1 and of `order`, in units of the signal."""
    h = to - begin
    shares = jnp.arange(order) / order
    places, grown = begin + shares * h, jnp.expm1(shares * h)
    # Call k is made at y less these multiples of the eps of the calls before it.
    weights = jnp.zeros((order, order)).at[:, 0].set(jnp.exp(-places) * grown)
    if order == 3:
        bend = 2 * jnp.exp(-places[2]) * (grown[2] / (shares[2] * h) - 1)
        weights = weights.at[2].add(bend * jnp.array([-1.0, 1.0, 0.0]))

    def call(found, now):
        index, place, row = now
        eps = eps_at(y - jnp.tensordot(row.astype(y.dtype), found, axes=1), place)
        return found.at[index].set(eps), None

    # In a loop, so that the network is compiled once.
    begun = jnp.zeros((order, *y.shape), y.dtype)
    (eps, *inner), _ = jax.lax.scan(call, begun, (jnp.arange(order), places, weights))
    straight, change = y - jnp.exp(-to) * jnp.expm1(h) * eps, [jnp.exp(-to) * (found - eps) for found in inner]
    if order == 2:
        return straight, straight - jnp.expm1(h) * change[0]
    return straight - 1.5 * jnp.expm1(h) * change[0], straight - 1.5 * (jnp.expm1(h) / h - 1) * change[1]


def _level(solver, half_log_snr):
    """Looks up time, signal and noise at a lambda, as `NoiseSchedule.time_of` and `at` do for concrete ones."""
    if solver.between is None:
        t = jnp.interp(jnp.logaddexp(0.0, -2 * half_log_snr), solver.knots, jnp.arange(solver.knots.size * 1.0))
        return t, jnp.sqrt(jax.nn.sigmoid(2 * half_log_snr)), jnp.sqrt(jax.nn.sigmoid(-2 * half_log_snr))
    signal, noise = map(jnp.asarray, solver.between)
    ratio = jnp.exp(-half_log_snr)
    lower = jnp.clip(jnp.searchsorted(jnp.asarray(solver.knots), ratio, side="right") - 1, 0, signal.size - 2)
    d_signal, d_noise = signal[lower + 1] - signal[lower], noise[lower + 1] - noise[lower]
    part = (ratio * signal[lower] - noise[lower]) / (d_noise - ratio * d_signal)
    a = signal[lower] + part * d_signal
    return lower + part, a, ratio * a
