"""Runs one of our tables and one of diffusers' schedulers on the same network and noise, both in float64.

diffusers writes float32 into its code. `in_double` makes that name mean float64 inside its scheduler modules, so that
its own unchanged lines run in double precision, and what remains of a difference is a difference of formulas.

Skips the module that imports it where torch or diffusers is not installed.
"""

import copy
import sys
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from reference import mixture_denoiser

from diffusion import schedules, timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 4)
"""A batch of two, three channels, four pixels."""

SCHEDULES = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
}
_CONFIGS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


KINDS = (
    *("DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "UniPCMultistep"),
    *("DEISMultistep", "PNDM", "IPNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"),
    *("LCM", "EDMEuler", "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "TCD", "SASolver"),
    "KDPM2AncestralDiscrete",
)
"""The schedulers compared."""

torch.set_num_threads(1)  # its tensors here are tiny


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def in_double():
    """diffusers' schedulers compute in float64 inside this context."""
    for kind in KINDS:
        getattr(diffusers, f"{kind}Scheduler")  # its modules load on first use
    modules = [m for name, m in sys.modules.items() if name.startswith("diffusers.schedulers.scheduling_")]
    saved = [(m, name, getattr(m, name)) for m in modules for name in ("torch", "np") if hasattr(m, name)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for module, name, original in saved:
            setattr(module, name, _Wide(original))
        yield
    finally:
        torch.set_default_dtype(default)
        for module, name, original in saved:
            setattr(module, name, original)


_BUILT = {}  # some take a tenth of a second to build


def library(kind, schedule, steps, **options):
    """A scheduler of diffusers on one of SCHEDULES by name, with its timesteps set."""
    key = (kind, schedule, repr(options), torch.get_default_dtype())
    if key not in _BUILT:
        _BUILT[key] = getattr(diffusers, f"{kind}Scheduler")(**_CONFIGS.get(schedule, {}), **options)
    scheduler = copy.deepcopy(_BUILT[key])
    scheduler.set_timesteps(steps)
    return scheduler


def put_sigmas(scheduler, sigmas):
    """Replaces the grid of a scheduler by these noise / signal ratios; the last one ends the last step."""
    scheduler.sigmas = torch.from_numpy(np.asarray(sigmas, np.float64))
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1)
    return scheduler


def network(schedule):
    """x_0(x, t): nonlinear, no ideal denoiser, mixes pixels, and depends on t beside the noise level."""

    def x0(x, t):
        return mixture_denoiser(x, *schedule.at(t)) + 0.1 * np.sin(3 * np.roll(x, 1, axis=-1) + t / 200)

    return x0


def ideal(schedule):
    """x_0(x, t): the mixture's ideal denoiser."""
    return lambda x, t: mixture_denoiser(x, *schedule.at(t))


def start(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE)


def fresh(count, seed=1):
    """Noise for so many network calls."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE))


def table_path(table, x0, x, z=None, exact=()):
    """What the network sees at each call, and the sample last; `exact` replaces the first of these."""
    registers, path = np.zeros((table.num_registers, *x.shape)), []
    registers[0] = x
    for i, (t, rows) in enumerate(zip(table.t, table.update, strict=True)):
        if i < len(exact):
            registers[0] = exact[i]
        path.append(registers[0])
        noise = np.zeros_like(x) if z is None else z[i]
        registers = np.tensordot(rows, np.stack([*registers, x0(registers[0], t), noise]), axes=1)
    return [*path, registers[0]]


def by_timestep(schedule, scheduler, t):
    """Our time of their timestep: they count from 0."""
    return float(t) + 1


def by_sigma(schedule, scheduler, t):
    """Our time at which noise / signal is their current sigma, whatever timestep they report."""
    index = scheduler.step_index or 0
    inner = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
    return float(schedule.time_of(-np.log(float((scheduler.sigmas_interpol if inner else scheduler.sigmas)[index]))))


def by_flow_sigma(schedule, scheduler, t):
    """Our time at which the noise of a rectified flow is their current sigma."""
    return float(scheduler.sigmas[scheduler.step_index or 0]) * schedule.num_timesteps


def sigma_grid(schedule, scheduler):
    """Our grid through their sigmas, then 0."""
    sigmas = np.unique(scheduler.sigmas.numpy())[::-1]
    return timesteps.explicit(schedule, schedule.time_of(-np.log(sigmas[sigmas > 0])))


def whole_grid(schedule, scheduler, end=(0,)):
    """Our grid of their timesteps; end (1, 0) where their last step goes to timestep 0 of theirs, 1 of ours."""
    return timesteps.explicit(schedule, [*(scheduler.timesteps.numpy() + 1), *end])


_OUTPUTS = {
    "epsilon": lambda x, d, a, n: (x - a * d) / n,
    "v_prediction": lambda x, d, a, n: (a * x - d) / n,
    "sample": lambda x, d, a, n: d,
    "flow_prediction": lambda x, d, a, n: (x - (a + n) * d) / n,
    # EDM's F, from D = 0.25 / (n^2 + 0.25) x + 0.5 n / sqrt(n^2 + 0.25) F
    "edm": lambda x, d, a, n: (d - 0.25 / (n**2 + 0.25) * x) * (n**2 + 0.25) ** 0.5 / (0.5 * n),
}


def library_path(
    scheduler, schedule, x0, x, z=None, clock=by_timestep, output="epsilon", exact=(), before_step=None, **step_options
):
    """As `table_path`, for a scheduler; all in our scale. clock gives our time of a call, z the noise that it draws."""
    module, path, call = sys.modules[type(scheduler).__module__], [], 0

    def given(shape, *args, dtype=None, **kwargs):
        return torch.from_numpy(np.zeros(x.shape) if z is None else z[call]).to(dtype)

    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # without it a scheduler looks its place up by the timestep, which may repeat
    scale = getattr(type(scheduler), "scale_model_input", lambda self, sample, t: sample)
    divided = "sigmas" in scale.__code__.co_names  # k-diffusion's kind keeps x / a
    sample, last = x, 1.0
    with mock.patch.object(module, "randn_tensor", given, create=True):
        for call, t in enumerate(scheduler.timesteps):
            time = clock(schedule, scheduler, t)
            a, n = schedule.at(time)
            factor = a if divided else 1.0
            if call == 0:
                sample = torch.from_numpy(x / factor)
            if call < len(exact):
                sample = torch.from_numpy(exact[call] / factor)
            path.append(sample.numpy() * factor)
            seen = scale(scheduler, sample, t).numpy()
            np.testing.assert_allclose(seen, path[-1] / ((n**2 + 0.25) ** 0.5 if output == "edm" else 1), rtol=1e-9)
            if before_step is not None:
                before_step(scheduler, call)
            answer = torch.from_numpy(_OUTPUTS[output](path[-1], x0(path[-1], time), a, n)).to(sample.dtype)
            sample = scheduler.step(answer, t, sample, **step_options).prev_sample
    if divided and float(scheduler.sigmas[-1]) > 0 and output != "edm":
        last = float(1 / np.sqrt(1 + float(scheduler.sigmas[-1]) ** 2))
    return [*path, sample.numpy() * last]


def difference(ours, theirs):
    """The largest difference of two paths of as many network calls, as a share of the largest x where above 1.

    Solvers in the eps basis that start at nearly no signal overshoot: x grows to 1e8 there with theirs and with ours.
    """
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    scale = max(1.0, *(float(np.max(np.abs(x))) for x in ours))
    return max(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True)) / scale


def agree(ours, theirs, tolerance=1e-8):
    """Both saw the same at every call, and drew the same sample."""
    worst = difference(ours, theirs)
    assert worst < tolerance, worst
