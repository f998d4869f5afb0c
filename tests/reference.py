"""Independent mathematics that the tests compare with: exact powers, ideal denoisers, one-line errors."""

import re
from contextlib import contextmanager
from decimal import Decimal, localcontext

import numpy as np
import pytest

from diffusion import testbeds
from diffusion.errors import InputError


@contextmanager
def refused(pattern=""):
    """Expects an InputError whose message is one line that holds the pattern."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert re.search(pattern, message), f"{pattern!r} not in {message!r}"


def exact_powers(betas):
    """alpha_bar and 1 - alpha_bar of given one-step variances, each correctly rounded from 60 digits."""
    with localcontext() as context:
        context.prec = 60
        alpha_bar = [Decimal(1)]
        for beta in betas:
            alpha_bar.append(alpha_bar[-1] * (1 - Decimal(float(beta))))
        return np.array([float(a) for a in alpha_bar]), np.array([float(1 - a) for a in alpha_bar])


def exact_transition_var(betas, t, s):
    """1 - alpha_bar_t / alpha_bar_s as 1 - prod of the alphas between, by sums of logarithms of small numbers."""
    logs = np.concatenate([[0], np.cumsum(np.log1p(-np.asarray(betas, np.longdouble)), dtype=np.longdouble)])
    return np.asarray(-np.expm1(logs[t] - logs[s]), np.float64)


def gaussian_denoiser(x, signal, noise, mean, variance):
    """E[x_0 | x_t] for x_0 ~ N(mean, variance)."""
    return mean + signal * variance / (signal**2 * variance + noise**2) * (x - signal * mean)


MEANS, VARIANCES, WEIGHTS = (-0.8, 0.1, 0.9), (0.02, 0.05, 0.01), (0.3, 0.5, 0.2)


def mixture_denoiser(x, signal, noise, xp=np):
    """E[x_0 | x_t] for x_0 from a mixture of three Gaussians, elementwise."""
    logs, means = [], []
    for mean, variance, weight in zip(MEANS, VARIANCES, WEIGHTS, strict=True):
        marginal = signal**2 * variance + noise**2
        logs.append(np.log(weight) - 0.5 * xp.log(marginal) - 0.5 * (x - signal * mean) ** 2 / marginal)
        means.append(gaussian_denoiser(x, signal, noise, mean, variance))
    logs, means = xp.stack(logs), xp.stack(means)
    shares = xp.exp(logs - xp.max(logs, axis=0, keepdims=True))
    return xp.sum(shares * means, axis=0) / xp.sum(shares, axis=0)


def ideal_network(schedule, denoiser, prediction="x0"):
    """The apply_fn of a denoiser (x, signal, noise) -> x_0 that is known in closed form, at real times."""
    testbed = testbeds.from_denoiser(schedule, denoiser, prediction)

    def apply_fn(params, x, t, cond=None):
        return testbed.apply_fn(testbed.params, x, t)

    return apply_fn
