"""diffusers' side of `ranking.py`: its deterministic schedulers with their options and ways of spacing timesteps.

The network is called at the noise level of a scheduler's state, even where the timestep that it reports is rounded, and
starts from the same noise in the scheduler's own scale. IPNDM and the EDM schedulers have noise schedules of their own
and are left out. UniPC's bh1 is not finite at sigma = 0, so it ends at sigma_min, as DPM-Solver in the eps basis must.
"""

import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

diffusers.logging.set_verbosity_error()

CONFIGS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

_PP, _EPS = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
THEIRS = [
    ("DDIM", {"clip_sample": False}),
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("PNDM", {"skip_prk_steps": False, "set_alpha_to_one": True}),
    *[
        ("DPMSolverMultistep", {"solver_order": order, "solver_type": kind, **end, **_PP})
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        for end in ({}, {"lower_order_final": False})
    ],
    *[("DPMSolverMultistep", {"solver_order": order, **_EPS}) for order in (2, 3)],
    *[
        ("DPMSolverSinglestep", {"solver_order": order, "solver_type": k})
        for order in (2, 3)
        for k in ("midpoint", "heun")
    ],
    *[
        ("UniPCMultistep", {"solver_order": order, "solver_type": kind, **end})
        for order in (1, 2, 3)
        for kind, last in (("bh1", {"final_sigmas_type": "sigma_min"}), ("bh2", {}))
        for end in (last, {"disable_corrector": [0], **last})
    ],
    *[
        ("DEISMultistep", {"solver_order": order, **end})
        for order in (2, 3)
        for end in ({}, {"lower_order_final": False})
    ],
    ("EulerDiscrete", {}),
    ("HeunDiscrete", {}),
    ("KDPM2Discrete", {}),
    ("LMSDiscrete", {}),
    *[
        ("SASolver", {"predictor_order": p, "corrector_order": c, "tau_func": lambda t: 0})
        for p, c in ((2, 2), (3, 3), (3, 4))
    ],
]


def library_rows(problem, schedule_name, budget):
    """(solver, grid, calls, sample) of every scheduler on every spacing that it has."""
    torch.set_num_threads(1)
    network = jax.jit(lambda x, t: problem.testbed.apply_fn(problem.testbed.params, x, jnp.full(len(x), t)))
    rows = []
    for kind, options in THEIRS:
        known = inspect.signature(getattr(diffusers, f"{kind}Scheduler").__init__).parameters
        grids = [{"timestep_spacing": spacing} for spacing in SPACINGS if "timestep_spacing" in known]
        grids = grids or [{}]
        grids += [{name: True} for name in SIGMAS if name in known]
        for grid in grids:
            scheduler = within(budget, kind, {**CONFIGS[schedule_name], **options, **grid})
            if scheduler is None:
                continue
            x = run(scheduler, problem.schedule, network, problem.noise)
            rows.append((label(kind, options), grid_label(grid), len(scheduler.timesteps), x))
    return rows


def grid_label(grid):
    """The name of a spacing: "trailing", "karras_sigmas", or "its own" where there is no choice."""
    name, value = next(iter(grid.items()), ("", "its own"))
    return name.removeprefix("use_") if value is True else value


def label(kind, options):
    hidden = ("clip_sample", "algorithm_type", "tau_func")
    shown = [f"{name}={value}" for name, value in options.items() if name not in hidden]
    shown += ["dpmsolver"] * (options.get("algorithm_type") == "dpmsolver")
    return f"{kind}({', '.join(shown)})"


def within(budget, kind, options):
    """The scheduler of most steps whose calls stay within the budget, or None where it takes no such number."""
    for steps in range(budget, 0, -1):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError, RuntimeError):
            continue
        if len(scheduler.timesteps) <= budget:
            return scheduler
    return None


def run(scheduler, schedule, network, noise):
    """The sample; NaN where the scheduler fails."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    scale = getattr(type(scheduler), "scale_model_input", lambda self, sample, t: sample)
    divided = "sigmas" in scale.__code__.co_names  # k-diffusion's kind keeps x / a
    sample = None
    for t in scheduler.timesteps:
        time = time_of(schedule, scheduler, t)
        factor = float(schedule.at(time)[0]) if divided else 1.0
        if sample is None:
            sample = torch.from_numpy(noise / factor)
        eps = network(jnp.asarray(sample.numpy() * factor), time)
        try:
            sample = scheduler.step(torch.from_numpy(np.array(eps)), t, sample).prev_sample
        except (ValueError, IndexError, RuntimeError) as error:
            print(f"{type(scheduler).__name__} failed at t = {t}: {error}")
            return np.full(noise.shape, np.nan)
        sample = sample.to(torch.float64)
    if divided and float(scheduler.sigmas[-1]) > 0:
        sample = sample / np.sqrt(1 + float(scheduler.sigmas[-1]) ** 2)
    return sample.numpy()


def time_of(schedule, scheduler, t):
    """Our time of a call: that of the current sigma, or the timestep, which counts from 0, where there is none."""
    if not hasattr(scheduler, "sigmas"):
        return float(t) + 1
    index = scheduler.step_index or 0
    inner = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
    sigma = float((scheduler.sigmas_interpol if inner else scheduler.sigmas)[index])
    # Their float32 may pass the end of the schedule.
    return float(schedule.time_of(max(-np.log(sigma), float(schedule.half_log_snr(schedule.num_timesteps)))))
