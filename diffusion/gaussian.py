"""The Gaussian diffusion process in jitted functions: it noises, converts predictions and computes posteriors.

Public functions are jitted and pure. They take a schedule, arrays in NHWC (or any shape with a leading axis B) and
timesteps t > s as int scalars or int [B]. Images are floats, and 8-bit values are refused. Traced code cannot raise, so
a timestep outside 0..T or a step with s >= t gives NaN instead of a clamped value. The formulas hold for any (signal,
noise) pair, not just a^2 + n^2 = 1.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.images import check_floats
from diffusion.schedules import NoiseSchedule, transition_var
from diffusion.types import Images, Timesteps


def _of_images(function):
    """Jits a public function of images, and refuses arguments that hold 8-bit values, by name, before it is traced."""
    jitted = jax.jit(function)
    signature = inspect.signature(function)
    noisy = {"x_0": False, "x_t": True, "eps": True}

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in noisy:
                check_floats(name, value, noisy=noisy[name])
        return jitted(*args, **kwargs)

    # A jitted function can do more than be called: it can be lowered, for example.
    vars(checked).update({name: getattr(jitted, name) for name in dir(jitted) if not name.startswith("__")})
    return checked


@_of_images
def q_sample(schedule: NoiseSchedule, x_0: Images, t: Timesteps, eps: Images) -> Images:
    """Noises x_0 in one jump, x_t = a_t x_0 + n_t eps: the forward process (DDPM, arXiv:2006.11239, Eq. 4)."""
    return _signal(schedule, t, x_0) * x_0 + _noise(schedule, t, x_0) * eps


@_of_images
def predict_x0(schedule: NoiseSchedule, x_t: Images, t: Timesteps, eps: Images) -> Images:
    """Computes x_0 = (x_t - n_t eps) / a_t from x_t and its noise (DDPM, Eq. 15); not finite where a_t = 0."""
    return (x_t - _noise(schedule, t, x_t) * eps) / _signal(schedule, t, x_t)


@_of_images
def predict_eps(schedule: NoiseSchedule, x_t: Images, t: Timesteps, x_0: Images) -> Images:
    """Computes eps = (x_t - a_t x_0) / n_t, the inverse of predict_x0; not finite at t = 0."""
    return (x_t - _signal(schedule, t, x_t) * x_0) / _noise(schedule, t, x_t)


@_of_images
def velocity(schedule: NoiseSchedule, x_0: Images, t: Timesteps, eps: Images) -> Images:
    """Computes v = a_t eps - n_t x_0 (Salimans & Ho, arXiv:2202.00512, appendix D).

    If a_t^2 + n_t^2 = 1, x_0 = a_t x_t - n_t v.
    """
    return _signal(schedule, t, x_0) * eps - _noise(schedule, t, x_0) * x_0


@_of_images
def posterior(
    schedule: NoiseSchedule, x_t: Images, x_0: Images, t: Timesteps, s: Timesteps
) -> tuple[Images, Float[Array, ""] | Float[Array, "B"]]:
    """Computes the posterior q(x_s | x_t, x_0) of the respaced process (improved DDPM, arXiv:2102.09672, Eq. 19).

    It holds for any s < t: the alpha of the step is alpha_bar_t / alpha_bar_s, not the original alpha_t.

    Returns:
      mean in x_t's shape; variance in t's shape, squared pixel units, 0 where s = 0.
    """
    _, fresh = _shares(schedule, t, s)
    add = jnp.sqrt(_at(schedule.alpha_bar, s)) * fresh
    keep = _ratio(schedule, t, s) * _at(schedule.noise_var, s) / _at(schedule.noise_var, t)
    mean = _expand(keep, x_t) * x_t + _expand(add, x_t) * x_0
    return mean, fresh * _at(schedule.noise_var, s)


@jax.jit
def ddim_sigma(schedule: NoiseSchedule, t: Timesteps, s: Timesteps, eta) -> Float[Array, ""] | Float[Array, "B"]:
    """Computes the std of the fresh noise that one reverse step from t down to s adds.

    Denoising Diffusion Implicit Models (arXiv:2010.02502), Eq. 16, where the paper's alpha is our alpha_bar.

    Args:
      schedule: the noise schedule.
      t, s: int [B] or scalars, 0 <= s < t <= T.
      eta: 0 gives deterministic DDIM, 1 the respaced DDPM posterior.

    Returns:
      In t's shape, in pixel units of [-1, 1]; 0 where s = 0.
    """
    return split_noise(schedule, t, s, eta)[1] * jnp.sqrt(_at(schedule.noise_var, s))


@jax.jit
def split_noise(schedule: NoiseSchedule, t: Timesteps, s: Timesteps, eta):
    """Splits the noise of x_s as DDIM does: eps_s = A eps_t + B z with A^2 + B^2 = 1.

    x_s = a_s x_0 + n_s (A eps_t + B z) keeps the marginal of x_s for every eta; ddim_sigma = n_s B (arXiv:2010.02502,
    Eq. 12).

    Args:
      schedule: the noise schedule.
      t, s: int [B] or scalars, 0 <= s < t <= T.
      eta: 0 (B = 0, deterministic) to 1 (the DDPM posterior).

    Returns:
      (A, B) in t's shape, both in 0..1.
    """
    kept, fresh = _shares(schedule, t, s)
    return kept_noise(kept, eta), eta * jnp.sqrt(fresh)


def signal_noise(schedule: NoiseSchedule, t: Timesteps, x: Images) -> tuple[Images, Images]:
    """Returns a_t and n_t in x's dtype, with the trailing axes that let them broadcast to x."""
    return _signal(schedule, t, x), _noise(schedule, t, x)


def posterior_shares(alpha_bar_t, noise_var_t, alpha_bar_s, noise_var_s):
    """Splits the variance of x_s's noise in the posterior q(x_s | x_t, x_0) into two shares, which add up to 1.

    It is plain arithmetic for NumPy and JAX alike, in which nothing cancels.

    Returns:
      (kept, fresh): the share that continues the noise of x_t, SNR_t / SNR_s, and the share that is drawn anew.
    """
    kept = alpha_bar_t * noise_var_s / (alpha_bar_s * noise_var_t)
    return kept, transition_var(alpha_bar_t, noise_var_t, alpha_bar_s, noise_var_s) / noise_var_t


def kept_noise(kept, eta):
    """Computes A = sqrt(1 - eta^2 (1 - kept)) of DDIM's split, written so that nothing cancels at eta = 1."""
    return ((1 - eta) * (1 + eta) + eta**2 * kept) ** 0.5


def _at(values, t):
    """Looks up values[t] in t's shape; NaN where t lies outside 0..T, as plain indexing would clamp or wrap."""
    values, t = jnp.asarray(values), jnp.asarray(t)
    return values.at[jnp.where(t < 0, values.size, t)].get(mode="fill", fill_value=jnp.nan)


def _expand(coefficient, x):
    """Gives a scalar or [B] coefficient the trailing axes of x, and x's dtype."""
    coefficient = coefficient.astype(x.dtype)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


def _signal(schedule, t, x):
    """Looks up a_t, shaped to multiply x."""
    return _expand(jnp.sqrt(_at(schedule.alpha_bar, t)), x)


def _noise(schedule, t, x):
    """Looks up n_t, shaped to multiply x."""
    return _expand(jnp.sqrt(_at(schedule.noise_var, t)), x)


def _ratio(schedule, t, s):
    """Computes a_t / a_s."""
    return jnp.sqrt(_at(schedule.alpha_bar, t) / _at(schedule.alpha_bar, s))


def _shares(schedule, t, s):
    """Computes posterior_shares of a step from t to s; NaN unless s < t."""
    powers = [_at(values, time) for time in (t, s) for values in (schedule.alpha_bar, schedule.noise_var)]
    valid = jnp.asarray(s) < jnp.asarray(t)
    return tuple(jnp.where(valid, share, jnp.nan) for share in posterior_shares(*powers))
