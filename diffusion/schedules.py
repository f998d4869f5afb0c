"""A noise schedule says how much signal and noise x_t holds at each timestep.

Everything here is NumPy float64. A schedule meets JAX once, as an argument of a jitted function, where it is cast to
the working precision. That is why noise_var is stored beside alpha_bar: 1 - alpha_bar in float32 loses 2e-4 relative
at t = 1.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, is_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A NoiseSchedule is x_t = sqrt(alpha_bar[t]) x_0 + sqrt(noise_var[t]) eps for t in 0..T; t = 0 is clean data.

    It is a pytree of two arrays, so that it can be traced. Their ratio, the SNR, descends strictly; their sum is 1 in a
    variance-preserving schedule. Between whole timesteps such a schedule continues with log(alpha_bar) linear in t, and
    any other with signal and noise linear in t.

    Attributes:
      alpha_bar: signal power, float64 [T + 1], alpha_bar[0] = 1.
      noise_var: noise power, 1 - alpha_bar if variance-preserving, float64 [T + 1], noise_var[0] = 0.
    """

    alpha_bar: Float[np.ndarray, "T+1"]
    noise_var: Float[np.ndarray, "T+1"]

    @property
    def num_timesteps(self) -> int:
        """Returns T."""
        return self.alpha_bar.shape[0] - 1

    @property
    def variance_preserving(self) -> bool:
        """Tells whether signal and noise power add up to 1 at every timestep."""
        return bool(np.all(np.abs(self.alpha_bar + self.noise_var - 1) < 1e-9))

    @property
    def betas(self) -> Float[np.ndarray, "T"]:
        """Computes the one-step forward variances; betas[t - 1] belongs to the step from t - 1 to t."""
        later, earlier = slice(1, None), slice(None, -1)
        return transition_var(
            self.alpha_bar[later], self.noise_var[later], self.alpha_bar[earlier], self.noise_var[earlier]
        )

    def powers(self, t) -> tuple[np.ndarray, np.ndarray]:
        """Looks up signal power alpha_bar_t and noise power 1 - alpha_bar_t at real times.

        Args:
          t: any shape, 0 <= t <= T.

        Returns:
          (alpha_bar, noise_var), float64 in t's shape; at whole t the stored values, to the last bit.

        Raises:
          InputError: a time lies outside 0..T.
        """
        t = np.asarray(t, np.float64)
        if not np.all((t >= 0) & (t <= self.num_timesteps)):
            raise InputError(f"time {t} lies outside 0..{self.num_timesteps}")
        lower = np.minimum(t, self.num_timesteps - 1).astype(int)
        weight = t - lower
        between = _geometric if self.variance_preserving else _linear
        alpha_bar, noise_var = between(self, lower, weight)
        # At whole times the stored values are returned, because interpolation would round them.
        ends = [(weight == 0, lower), (weight == 1, lower + 1)]
        for is_end, index in ends:
            alpha_bar = np.where(is_end, self.alpha_bar[index], alpha_bar)
            noise_var = np.where(is_end, self.noise_var[index], noise_var)
        return alpha_bar, noise_var

    def at(self, t) -> tuple[np.ndarray, np.ndarray]:
        """Looks up signal a_t and noise n_t at real times: the square roots of powers(t)."""
        alpha_bar, noise_var = self.powers(t)
        return np.sqrt(alpha_bar), np.sqrt(noise_var)

    def half_log_snr(self, t) -> np.ndarray:
        """Computes lambda_t = log(a_t / n_t) at real times, float64 in t's shape; it descends from +inf at t = 0."""
        alpha_bar, noise_var = self.powers(t)
        with np.errstate(divide="ignore"):
            return 0.5 * (np.log(alpha_bar) - np.log(noise_var))

    def time_of(self, half_log_snr) -> np.ndarray:
        """Finds the real time at which lambda_t has the given value: the inverse of half_log_snr, float64 in 0..T.

        Raises:
          InputError: no time has this value.
        """
        value = np.asarray(half_log_snr, np.float64)
        lowest = self.half_log_snr(self.num_timesteps)
        if not np.all(value >= lowest - 1e-9 * abs(lowest)):
            raise InputError(f"half log-SNR {np.min(value):.6g} is below the schedule's lowest, {lowest:.6g}")
        return (_geometric_time if self.variance_preserving else _linear_time)(self, value)


def fingerprint(schedule: NoiseSchedule) -> str:
    """Returns 16 hex digits that tell schedules apart: of T, and of signal and noise power at nine times."""
    times = np.linspace(0, schedule.num_timesteps, 9)
    # Rounded, because the cosines of two machines can differ in their last digits.
    powers = [f"{value:.6g}" for value in np.concatenate(schedule.powers(times))]
    return hashlib.sha256(" ".join([str(schedule.num_timesteps), *powers]).encode()).hexdigest()[:16]


def _geometric(schedule, lower, weight):
    """Interpolates with log(alpha_bar) linear in t, or alpha_bar where an interval ends at zero signal."""
    start, end = schedule.alpha_bar[lower], schedule.alpha_bar[lower + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_alpha_bar = (1 - weight) * np.log(start) + weight * np.log(end)
    alpha_bar = np.where(end > 0, np.exp(log_alpha_bar), (1 - weight) * start)
    return alpha_bar, np.where(end > 0, -np.expm1(log_alpha_bar), 1 - alpha_bar)


def _geometric_time(schedule, half_log_snr):
    """Inverts `_geometric`: the time of each lambda."""
    with np.errstate(divide="ignore"):
        knots = -np.log(schedule.alpha_bar)  # ascending from 0; +inf at the end at zero terminal SNR
    # alpha_bar = sigmoid(log SNR), so -log(alpha_bar) = softplus(-log SNR).
    value = np.logaddexp(0.0, -2 * half_log_snr)
    if np.isfinite(knots[-1]):
        return np.interp(value, knots, np.arange(knots.size))
    last = schedule.num_timesteps - np.exp(-value) / schedule.alpha_bar[-2]
    return np.where(value > knots[-2], last, np.interp(value, knots[:-1], np.arange(knots.size - 1)))


def _linear(schedule, lower, weight):
    """Interpolates with signal and noise linear in t."""
    signal, noise = np.sqrt(schedule.alpha_bar), np.sqrt(schedule.noise_var)
    return tuple(((1 - weight) * v[lower] + weight * v[lower + 1]) ** 2 for v in (signal, noise))


def _linear_time(schedule, half_log_snr):
    """Inverts `_linear`: the time of each lambda."""
    signal, noise = np.sqrt(schedule.alpha_bar), np.sqrt(schedule.noise_var)
    with np.errstate(over="ignore"):
        ratio = np.exp(-half_log_snr)  # noise / signal
    # The interval that holds the ratio, and the place in it where noise - ratio signal, linear in t, is 0.
    with np.errstate(divide="ignore"):
        lower = np.searchsorted(noise / signal, ratio, side="right") - 1
    lower = np.clip(lower, 0, schedule.num_timesteps - 1)
    d_signal, d_noise = signal[lower + 1] - signal[lower], noise[lower + 1] - noise[lower]
    with np.errstate(invalid="ignore"):
        time = lower + (ratio * signal[lower] - noise[lower]) / (d_noise - ratio * d_signal)
    # Where there is no signal, t = T; rounding must not pass it.
    return np.where(np.isinf(ratio), schedule.num_timesteps, np.minimum(time, schedule.num_timesteps))


def transition_var(alpha_bar_t, noise_var_t, alpha_bar_s, noise_var_s):
    """Computes the variance of q(x_t | x_s), in VP form 1 - alpha_bar_t / alpha_bar_s, for any (signal, noise) pair.

    It is plain arithmetic for NumPy and JAX alike. Written with both powers, the difference is small against neither:
    at small t noise_var is exact, at large t alpha_bar is.
    """
    return (noise_var_t * alpha_bar_s - alpha_bar_t * noise_var_s) / alpha_bar_s


def from_betas(betas) -> NoiseSchedule:
    """Builds the schedule with given one-step variances.

    Args:
      betas: [T], 0 < beta < 1; the last one may be 1 (zero terminal SNR).

    Raises:
      InputError: not a vector, or a value outside the range.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise InputError(f"betas have shape {betas.shape}; give a non-empty vector of one-step variances")
    good = (betas > 0) & (betas < 1)
    good[-1] |= betas[-1] == 1
    if not good.all():
        index = int(np.argmin(good))
        raise InputError(f"beta of timestep {index + 1} is {betas[index]}; one-step variances lie between 0 and 1")
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    alpha_bar = np.exp(log_alpha_bar)
    if not np.all(np.diff(alpha_bar) < 0):
        index = int(np.argmax(np.diff(alpha_bar) >= 0)) + 1
        raise InputError(f"alpha_bar underflows at timestep {index}; use smaller betas or fewer timesteps")
    return NoiseSchedule(alpha_bar=alpha_bar, noise_var=0.0 - np.expm1(log_alpha_bar))


def linear(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_snr: bool = False
) -> NoiseSchedule:
    """Builds beta_t linear in t (DDPM, arXiv:2006.11239, section 4). The ends are not rescaled with num_timesteps.

    zero_snr rescales it so that no signal is left at T, see `zero_terminal_snr`.
    """
    schedule = from_betas(np.linspace(beta_start, beta_end, _count(num_timesteps)))
    return zero_terminal_snr(schedule) if zero_snr else schedule


def scaled_linear(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_snr: bool = False
) -> NoiseSchedule:
    """Builds sqrt(beta_t) linear in t (latent diffusion, arXiv:2112.10752); the defaults are Stable Diffusion's.

    zero_snr is as in `linear`.
    """
    schedule = from_betas(np.linspace(beta_start**0.5, beta_end**0.5, _count(num_timesteps)) ** 2)
    return zero_terminal_snr(schedule) if zero_snr else schedule


def cosine(
    num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999, zero_snr: bool = False
) -> NoiseSchedule:
    """Builds alpha_bar as a squared cosine of t (improved DDPM, arXiv:2102.09672, Eq. 17), beta at most max_beta.

    Args:
      num_timesteps: T.
      offset: the paper's s, at least 0; it keeps beta from vanishing near t = 0.
      max_beta: the paper clips beta at 0.999 to avoid a singularity at t = T.
      zero_snr: as in `linear`.
    """
    if offset < 0:
        raise InputError(f"offset is {offset}; it must be at least 0")
    u = np.arange(_count(num_timesteps) + 1) / num_timesteps
    f = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    schedule = from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))
    return zero_terminal_snr(schedule) if zero_snr else schedule


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shifts and scales sqrt(alpha_bar) so that x_T is pure noise (Lin et al., arXiv:2305.08891, algorithm 1).

    sqrt(alpha_bar[1]) keeps its value and sqrt(alpha_bar[T]) becomes 0. An eps-model cannot then be sampled from t = T,
    because eps says nothing about x_0 there; use v or x_0 prediction.
    """
    if schedule.num_timesteps < 2 or not schedule.variance_preserving:
        raise InputError("zero_terminal_snr needs a variance-preserving schedule of at least 2 timesteps")
    signal = np.sqrt(schedule.alpha_bar[1:])
    alpha_bar = np.concatenate([[1.0], ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2])
    return from_betas(1 - alpha_bar[1:] / alpha_bar[:-1])


def from_signal_noise(signal, noise) -> NoiseSchedule:
    """Builds any schedule x_t = signal[t] x_0 + noise[t] eps.

    Args:
      signal, noise: [T + 1], not negative, from signal[0] = 1 and noise[0] = 0; signal / noise descends strictly.

    Raises:
      InputError: anything else.
    """
    signal, noise = np.asarray(signal, np.float64), np.asarray(noise, np.float64)
    if signal.ndim != 1 or signal.shape != noise.shape or signal.size < 2:
        raise InputError(f"signal and noise have shapes {signal.shape} and {noise.shape}; give two vectors of T + 1")
    with np.errstate(divide="ignore", invalid="ignore"):
        descends = np.diff(signal / noise) < 0
    finite = np.isfinite(signal**2).all() and np.isfinite(noise**2).all()
    if not finite or signal[0] != 1 or noise[0] != 0 or min(signal.min(), noise.min()) < 0 or not np.all(descends):
        raise InputError("signal and noise must be finite, start at 1 and 0, and signal / noise must descend")
    return NoiseSchedule(alpha_bar=signal**2, noise_var=noise**2)


def shifted_cosine(num_timesteps: int = 1000, image_size: int = 128, base_size: int = 64) -> NoiseSchedule:
    """Builds a cosine schedule with (base_size / image_size)^2 of its SNR (simple diffusion, arXiv:2301.11093, Eq. 4).

    The more pixels an image has, the more of its noise averages out. The shift adds noise to a large image until,
    averaged to base_size, it has as much as an image of that size.
    """
    if not (is_whole(image_size) and is_whole(base_size)) or image_size < 1 or base_size < 1:
        raise InputError(f"image_size is {image_size}, base_size {base_size}; both must be whole and at least 1")
    schedule = cosine(num_timesteps)
    signal_power = schedule.alpha_bar * (base_size / image_size) ** 2
    total = signal_power + schedule.noise_var
    return NoiseSchedule(alpha_bar=signal_power / total, noise_var=schedule.noise_var / total)


def edm(
    num_timesteps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseSchedule:
    """Builds EDM's noise levels with signal 1 (arXiv:2206.00364, Eq. 5), from sigma_min at 1 to sigma_max at T.

    Use with prediction "edm", the paper's preconditioning, where the network sees log(sigma) / 4 and not t.
    """
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise InputError(f"sigma_min is {sigma_min}, sigma_max {sigma_max}, rho {rho}; need 0 < min < max and rho > 0")
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), _count(num_timesteps))  # T = 1 is sigma_max
    levels = roots[::-1] ** rho
    return from_signal_noise(np.ones(levels.size + 1), np.concatenate([[0.0], levels]))


def rectified_flow(num_timesteps: int = 1000) -> NoiseSchedule:
    """Builds x_t = (1 - t/T) x_0 + (t/T) eps (Liu et al., arXiv:2209.03003); use with prediction "flow"."""
    noise = np.arange(_count(num_timesteps) + 1) / num_timesteps
    return from_signal_noise(1 - noise, noise)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "cosine": cosine,
    "scaled_linear": scaled_linear,
    "shifted_cosine": shifted_cosine,
    "edm": edm,
    "rectified_flow": rectified_flow,
}
"""The schedules by name."""


def _count(num_timesteps: int) -> int:
    """Returns the number of timesteps as an int if it is whole and at least 1."""
    if not is_whole(num_timesteps) or not 1 <= num_timesteps <= 10**6:  # a schedule holds arrays of T + 1 numbers
        raise InputError(f"num_timesteps is {num_timesteps}; it must be a whole number in 1..1,000,000")
    return int(num_timesteps)
