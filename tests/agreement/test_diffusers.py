"""Our tables agree with Hugging Face diffusers' schedulers, at every network call and in the sample.

Their timesteps count from 0 and ours from 1, so t = their timestep + 1; the grids are theirs, so that the arithmetic of
the solvers is compared. Where a scheduler steps in sigma = noise / signal at fractional times, ours is built on the
times of its sigmas. What differs on purpose stands in test_diffusers_differences.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sidebyside import (
    SCHEDULES,
    SHAPE,
    agree,
    by_flow_sigma,
    by_sigma,
    diffusers,
    fresh,
    in_double,
    library,
    library_path,
    network,
    put_sigmas,
    sigma_grid,
    start,
    table_path,
    torch,
    whole_grid,
)

import diffusion
from diffusion import schedules, timesteps
from diffusion.solvers import ddim, ddpm, dpm_solver_pp, unipc
from diffusion.solvers.adams import deis, ipndm, lms, plms, pndm
from diffusion.solvers.heun import heun
from diffusion.solvers.onestep import consistency, euler, euler_ancestral
from diffusion.solvers.singlestep import dpm_solver, dpm_solver_pp_singlestep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = (1, 2, 5, 7, 10, 25)
DIVISORS = (1, 2, 5, 10, 25)  # where T // S is the distance of neighbours on every grid that diffusers has
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_spacing = pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])


@pytest.fixture(autouse=True)
def double():
    with in_double():
        yield


@every_schedule
def test_the_noise_schedules_agree_with_diffusers(name):
    theirs = library("DDPM", name, 10)
    np.testing.assert_allclose(SCHEDULES[name].alpha_bar[1:], theirs.alphas_cumprod.numpy(), rtol=1e-12)


def test_the_zero_snr_schedule_agrees_with_diffusers():
    theirs = library("DDIM", "scaled_linear", 10, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    ours = schedules.zero_terminal_snr(SCHEDULES["scaled_linear"])
    np.testing.assert_allclose(ours.alpha_bar[1:], theirs, rtol=1e-10, atol=1e-15)


@every_schedule
def test_the_grids_agree_with_diffusers(name):
    """`linspace` rounds halves to even in 0..T-1 there and in 1..T here, so those are left out."""
    schedule = SCHEDULES[name]
    for steps in (1, 2, 7, 10, 25, 60, 1000):
        for spacing in ("leading", "trailing"):
            grid = whole_grid(schedule, library("DDPM", name, steps, timestep_spacing=spacing))
            np.testing.assert_array_equal(grid, timesteps.GRIDS[spacing](schedule, steps))
    for steps in (1, 2, 10, 25):
        for option, grid in (("karras_sigmas", "karras"), ("exponential_sigmas", "log_snr"), ("lu_lambdas", "log_snr")):
            sigmas = library("DPMSolverMultistep", name, steps, **{f"use_{option}": True}).sigmas.numpy()[:-1]
            lambdas = schedule.half_log_snr(timesteps.GRIDS[grid](schedule, steps)[:-1])
            np.testing.assert_allclose(np.exp(-lambdas), sigmas, rtol=1e-9)


@every_spacing
@every_schedule
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_agrees_with_diffusers(name, spacing, variance):
    """On every grid: diffusers repaired the previous timestep of this scheduler (diffusers#9384), of DDIM's not."""
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library(
            "DDPM", name, steps, timestep_spacing=spacing, clip_sample=False, variance_type=f"fixed_{variance}"
        )
        z = fresh(steps)
        z[-1] = 0  # see test_diffusers_add_noise_in_the_last_step
        table = ddpm(schedule, whole_grid(schedule, theirs), variance)
        agree(
            table_path(table, network(schedule), start(), z),
            library_path(theirs, schedule, network(schedule), start(), z),
        )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "counts"), [("leading", STEPS), ("trailing", DIVISORS)])
@every_schedule
def test_ddim_agrees_with_diffusers(name, spacing, counts, eta):
    schedule = SCHEDULES[name]
    for steps in counts:
        theirs = library("DDIM", name, steps, timestep_spacing=spacing, clip_sample=False)
        z = fresh(steps)
        agree(
            table_path(ddim(schedule, whole_grid(schedule, theirs), eta), network(schedule), start(), z),
            library_path(theirs, schedule, network(schedule), start(), z, eta=eta),
        )


def test_ddim_ends_at_t_1_where_diffusers_do_not_set_alpha_to_one():
    """Stable Diffusion's setting; our table goes on to 0, so what its last call sees is their sample."""
    schedule = SCHEDULES["scaled_linear"]
    for steps in DIVISORS:
        theirs = library(
            "DDIM", "scaled_linear", steps, set_alpha_to_one=False, clip_sample=False, timestep_spacing="trailing"
        )
        table = ddim(schedule, whole_grid(schedule, theirs, end=(1, 0)))
        ours = table_path(table, network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start()))


def test_ddim_from_zero_signal_agrees_with_diffusers():
    schedule = schedules.zero_terminal_snr(SCHEDULES["scaled_linear"])
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for steps in DIVISORS:
        theirs = library("DDIM", "scaled_linear", steps, clip_sample=False, **options)
        for eta in (0.0, 1.0):
            z = fresh(steps)
            agree(
                table_path(ddim(schedule, whole_grid(schedule, theirs), eta), network(schedule), start(), z),
                library_path(theirs, schedule, network(schedule), start(), z, output="v_prediction", eta=eta),
                tolerance=1e-7,  # sqrt(n_s^2 - sigma^2) is 0 in the first step and sqrt(1e-16) there
            )


@pytest.mark.parametrize(("spacing", "counts"), [("leading", STEPS), ("trailing", DIVISORS)])
@every_schedule
def test_reversed_ddim_agrees_with_diffusers_inverse(name, spacing, counts):
    """From clean images at our t = 0, their timestep -1, with alpha_bar = 1; both ask the network at the new t."""
    schedule = SCHEDULES[name]
    for steps in counts:
        theirs = library("DDIMInverse", name, steps, timestep_spacing=spacing, clip_sample=False)
        tau = timesteps.explicit(schedule, theirs.timesteps.numpy()[::-1] + 1)
        agree(
            table_path(ddim(schedule, tau).reverse(), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start()),
        )


def dpm_options(order, solver_type, steps):
    """Ours for theirs: heun is the exact 2M, midpoint the official one; the end is lowered below 15 steps alone."""
    variant = "exact" if solver_type == "heun" else "official"
    return {"order": order, "variant": variant, "lower_order_final": steps < 15}


DPM = [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]


@pytest.mark.parametrize(("order", "solver_type"), DPM)
@every_spacing
@every_schedule
def test_dpm_solver_pp_agrees_with_diffusers(name, spacing, order, solver_type):
    schedule = SCHEDULES[name]
    for steps in (*STEPS, 15):
        theirs = library(
            "DPMSolverMultistep", name, steps, timestep_spacing=spacing, solver_order=order, solver_type=solver_type
        )
        table = dpm_solver_pp(schedule, whole_grid(schedule, theirs), **dpm_options(order, solver_type, steps))
        agree(table_path(table, network(schedule), start()), library_path(theirs, schedule, network(schedule), start()))


@pytest.mark.parametrize(("order", "solver_type"), DPM[:3])
@every_spacing
@every_schedule
def test_sde_dpm_solver_pp_agrees_with_diffusers(name, spacing, order, solver_type):
    """sde_eta = 1; for order 3 see test_third_order_sde_of_diffusers_has_a_wrong_sign."""
    schedule = SCHEDULES[name]
    options = {"solver_order": order, "solver_type": solver_type, "algorithm_type": "sde-dpmsolver++"}
    for steps in STEPS:
        theirs = library("DPMSolverMultistep", name, steps, timestep_spacing=spacing, **options)
        z, ours = fresh(steps), dpm_options(order, solver_type, steps)
        agree(
            table_path(
                dpm_solver_pp(schedule, whole_grid(schedule, theirs), sde_eta=1.0, **ours),
                network(schedule),
                start(),
                z,
            ),
            library_path(theirs, schedule, network(schedule), start(), z),
        )


@pytest.mark.parametrize(("order", "solver_type"), DPM)
@every_schedule
def test_dpm_solver_pp_to_sigma_min_agrees_with_diffusers(name, order, solver_type):
    """Their last step goes to t = 1 of ours, at the order that lower_order_final leaves; ours then goes on to 0."""
    schedule = SCHEDULES[name]
    for steps in STEPS:
        options = {"solver_order": order, "solver_type": solver_type, "final_sigmas_type": "sigma_min"}
        theirs = library("DPMSolverMultistep", name, steps, **options)
        lowered = np.arange(steps, 0, -1) if steps < 15 else np.full(steps, order)
        orders = [*np.minimum.reduce([lowered, np.arange(steps) + 1, np.full(steps, order)]), 1]
        table = dpm_solver_pp(
            schedule, whole_grid(schedule, theirs, end=(1, 0)), orders, variant=dpm_options(*DPM[0], 1)["variant"]
        )
        if solver_type == "heun":
            table = dpm_solver_pp(schedule, whole_grid(schedule, theirs, end=(1, 0)), orders)
        ours = table_path(table, network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start()))


@pytest.mark.parametrize("option", ["karras_sigmas", "exponential_sigmas", "lu_lambdas"])
@every_schedule
def test_dpm_solver_pp_on_karras_and_log_snr_grids_agrees_with_diffusers(name, option):
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library("DPMSolverMultistep", name, steps, **{f"use_{option}": True})
        table = dpm_solver_pp(schedule, sigma_grid(schedule, theirs), **dpm_options(2, "midpoint", steps))
        agree(
            table_path(table, network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_sigma),
        )


def test_dpm_solver_pp_near_zero_signal_agrees_with_diffusers():
    """Their log-SNR solvers put alpha_bar_T = 2^-24 for zero; on that schedule ours does the same."""
    zero = schedules.zero_terminal_snr(SCHEDULES["scaled_linear"])
    alpha_bar = np.append(zero.alpha_bar[:-1], 2.0**-24)
    schedule = schedules.NoiseSchedule(alpha_bar=alpha_bar, noise_var=1 - alpha_bar)
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for steps in STEPS:
        theirs = library("DPMSolverMultistep", "scaled_linear", steps, **options)
        table = dpm_solver_pp(schedule, whole_grid(schedule, theirs), **dpm_options(2, "midpoint", steps))
        agree(
            table_path(table, network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), output="v_prediction"),
        )


@every_schedule
def test_second_order_deis_is_multistep_dpm_solver_of_diffusers(name):
    """DPM-Solver in the eps basis with solver_type heun; theirs ends at sigma_min."""
    schedule = SCHEDULES[name]
    options = {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    for steps in STEPS:
        theirs = library("DPMSolverMultistep", name, steps, lower_order_final=False, **options)
        table = deis(schedule, whole_grid(schedule, theirs, end=(1, 0)), order=2, lower_order_final=False)
        ours = table_path(table, network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start()))


@every_schedule
@pytest.mark.parametrize("order", [1, 2])
def test_singlestep_dpm_solver_pp_agrees_with_diffusers(name, order):
    """A step of theirs is `order` neighbours of the grid; even in lambda they are the inner times of ours."""
    schedule = SCHEDULES[name]
    for calls in (1, 3, 5, 11, 25):
        theirs = library("DPMSolverSinglestep", name, calls, solver_order=order, use_exponential_sigmas=True)
        tau = np.append(timesteps.log_snr(schedule, calls)[:-1][::order], 0)
        agree(
            table_path(dpm_solver_pp_singlestep(schedule, tau, order), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_sigma),
        )


@every_schedule
def test_third_order_singlestep_dpm_solver_pp_is_made_of_both_solver_types_of_diffusers(name):
    """The authors' 3S takes heun's weights at the inner time and midpoint's at the end; they offer one for both."""

    def choose(scheduler, call):
        inner = scheduler.order_list[call] == 2
        scheduler.register_to_config(solver_type="heun" if inner else "midpoint")

    schedule = SCHEDULES[name]
    for calls in (1, 4, 7, 10, 25):
        theirs = library("DPMSolverSinglestep", name, calls, solver_order=3, use_exponential_sigmas=True)
        tau = np.append(timesteps.log_snr(schedule, calls)[:-1][::3], 0)
        agree(
            table_path(dpm_solver_pp_singlestep(schedule, tau, 3), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_sigma, before_step=choose),
        )


@every_schedule
def test_singlestep_dpm_solver_agrees_with_diffusers(name):
    """Order 2 in the eps basis; theirs cannot end at 0, so it stops where our last call is."""
    schedule = SCHEDULES[name]
    for calls in (2, 4, 10, 24):
        options = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": False}
        tau = timesteps.log_snr(schedule, calls + 1)
        sigmas = np.exp(-schedule.half_log_snr(tau[:-1]))
        theirs = put_sigmas(library("DPMSolverSinglestep", name, calls, **options), sigmas)
        ours = table_path(dpm_solver(schedule, np.append(tau[:-1][::2], 0), 2), network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start(), clock=by_sigma))


@every_spacing
@every_schedule
def test_dpm_solver_agrees_with_k_dpm_2_of_diffusers(name, spacing):
    """k-diffusion's DPM-2, a midpoint rule in sigma at the geometric mean, is DPM-Solver-2."""
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library("KDPM2Discrete", name, steps, timestep_spacing=spacing)
        agree(
            table_path(dpm_solver(schedule, sigma_grid(schedule, theirs), 2), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_sigma),
        )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@every_spacing
@every_schedule
def test_unipc_bh2_agrees_with_diffusers(name, spacing, order):
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library("UniPCMultistep", name, steps, timestep_spacing=spacing, solver_order=order)
        agree(
            table_path(unipc(schedule, whole_grid(schedule, theirs), order), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start()),
        )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@every_schedule
def test_unipc_to_sigma_min_agrees_with_diffusers(name, variant, order):
    """Without lowered orders at the end, so that our further step to 0 changes nothing before it."""
    schedule = SCHEDULES[name]
    options = {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": variant}
    for steps in STEPS:
        theirs = library("UniPCMultistep", name, steps, solver_order=order, **options)
        tau = whole_grid(schedule, theirs, end=(1, 0))
        ours = table_path(unipc(schedule, tau, order, variant, lower_order_final=False), network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start()))


def test_unipc_without_some_corrections_agrees_with_diffusers():
    schedule = SCHEDULES["linear"]
    for disabled in ([0], [0, 1, 3], list(range(10))):
        theirs = library("UniPCMultistep", "linear", 10, solver_order=3, disable_corrector=disabled)
        table = unipc(schedule, whole_grid(schedule, theirs), 3, disable_corrector=disabled)
        agree(table_path(table, network(schedule), start()), library_path(theirs, schedule, network(schedule), start()))


@pytest.mark.parametrize("order", [1, 2, 3])
@every_spacing
@every_schedule
def test_deis_agrees_with_diffusers(name, spacing, order):
    """Theirs knows no end but sigma_min; ours goes on to 0."""
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library(
            "DEISMultistep", name, steps, timestep_spacing=spacing, solver_order=order, lower_order_final=False
        )
        table = deis(schedule, whole_grid(schedule, theirs, end=(1, 0)), order, lower_order_final=False)
        ours = table_path(table, network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start()))


@pytest.mark.parametrize(("spacing", "counts"), [("leading", STEPS), ("trailing", DIVISORS)])
@every_schedule
def test_plms_agrees_with_diffusers(name, spacing, counts):
    schedule = SCHEDULES[name]
    for steps in counts:
        theirs = library("PNDM", name, steps, timestep_spacing=spacing, skip_prk_steps=True, set_alpha_to_one=True)
        tau = timesteps.explicit(schedule, np.unique(theirs.timesteps.numpy() + 1)[::-1])
        agree(
            table_path(plms(schedule, tau), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start()),
        )


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@every_schedule
def test_pndm_agrees_with_diffusers(name, spacing):
    """Where T // S is even, so that half a step is a timestep of theirs."""
    schedule = SCHEDULES[name]
    for steps in (5, 10, 25, 50):
        theirs = library("PNDM", name, steps, timestep_spacing=spacing, set_alpha_to_one=True)
        tau = timesteps.GRIDS[spacing](schedule, steps)
        agree(
            table_path(pndm(schedule, tau), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start()),
        )


K_GRIDS = [{"timestep_spacing": s} for s in ("leading", "trailing", "linspace")] + [{"use_karras_sigmas": True}]
every_k_grid = pytest.mark.parametrize("grid", K_GRIDS, ids=lambda g: str(next(iter(g.values()))))


@pytest.mark.parametrize("kind", ["Euler", "Heun", "LMS"])
@every_k_grid
@every_schedule
def test_euler_heun_and_lms_agree_with_diffusers(name, grid, kind):
    schedule, solver = SCHEDULES[name], {"Euler": euler, "Heun": heun, "LMS": lms}[kind]
    for steps in STEPS:
        theirs = library(f"{kind}Discrete", name, steps, **grid)
        agree(
            table_path(solver(schedule, sigma_grid(schedule, theirs)), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_sigma),
        )


@every_spacing
@every_schedule
def test_euler_ancestral_agrees_with_diffusers(name, spacing):
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs, z = library("EulerAncestralDiscrete", name, steps, timestep_spacing=spacing), fresh(steps)
        agree(
            table_path(euler_ancestral(schedule, sigma_grid(schedule, theirs)), network(schedule), start(), z),
            library_path(theirs, schedule, network(schedule), start(), z, clock=by_sigma),
        )


def test_euler_to_sigma_min_agrees_with_diffusers():
    schedule = SCHEDULES["linear"]
    for steps in STEPS:
        theirs = library("EulerDiscrete", "linear", steps, final_sigmas_type="sigma_min", timestep_spacing="trailing")
        ours = table_path(euler(schedule, sigma_grid(schedule, theirs)), network(schedule), start())
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start(), clock=by_sigma))


def test_ipndm_agrees_with_diffusers():
    """Theirs has a schedule of its own, given by its noise levels; it reads v."""
    schedule = SCHEDULES["linear"]
    for steps in STEPS:
        tau = timesteps.uniform(schedule, steps)
        scheduler = diffusers.IPNDMScheduler(trained_betas=schedule.at(tau)[1])
        scheduler.set_timesteps(steps)
        clock = partial(lambda times, *_: next(times), iter(tau[:-1]))
        agree(
            table_path(ipndm(schedule, tau), network(schedule), start()),
            library_path(scheduler, schedule, network(schedule), start(), clock=clock, output="v_prediction"),
        )


def test_consistency_sampling_agrees_with_lcm_of_diffusers():
    """LCM's scalings at the data end are part of its network: D = c_skip x + c_out x_0."""
    schedule = SCHEDULES["scaled_linear"]
    x0 = network(schedule)

    def scaled(x, t):
        far = (t - 1) * 10.0
        return 0.25 / (far**2 + 0.25) * x + far / (far**2 + 0.25) ** 0.5 * x0(x, t)

    for steps in (1, 2, 5, 7, 10):
        theirs, z = library("LCM", "scaled_linear", steps), fresh(steps)
        z[-1] = 0  # theirs adds none; ours adds n_0 z = 0
        agree(
            table_path(consistency(schedule, whole_grid(schedule, theirs)), scaled, start(), z),
            library_path(theirs, schedule, x0, start(), z),
        )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_solvers_on_edm_levels_agree_with_diffusers(order):
    """Signal 1 and Karras's sigmas, with EDM's preconditioning on their side; order 1 is Euler."""
    for steps in (2, 5, 10, 25):
        if order == 1:
            theirs = library("EDMEuler", "edm", steps)
        else:
            theirs = library("EDMDPMSolverMultistep", "edm", steps, solver_order=order)
        schedule = schedules.edm(steps)
        tau = timesteps.uniform(schedule, steps)
        np.testing.assert_allclose(schedule.at(tau)[1], theirs.sigmas.numpy(), rtol=1e-12)
        table = dpm_solver_pp(schedule, tau, **dpm_options(order, "midpoint", steps))
        x = 80 * start()
        agree(
            table_path(table, network(schedule), x),
            library_path(theirs, schedule, network(schedule), x, clock=by_sigma, output="edm"),
        )


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_solvers_on_rectified_flow_agree_with_diffusers(kind):
    schedule = schedules.rectified_flow(1000)
    for steps in STEPS:
        if kind == "FlowMatchEulerDiscrete":
            theirs = library(kind, "flow", steps, shift=3.0)
            build = ddim
        elif kind == "UniPCMultistep":
            theirs = library(kind, "flow", steps, **FLOW)
            build = lambda s, tau: unipc(s, tau, 2)  # noqa: E731
        else:
            theirs = library(kind, "flow", steps, **FLOW)
            build = lambda s, tau, n=steps: dpm_solver_pp(s, tau, **dpm_options(2, "midpoint", n))  # noqa: E731
        tau = timesteps.explicit(schedule, theirs.sigmas.numpy() * 1000)
        agree(
            table_path(build(schedule, tau), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_flow_sigma, output="flow_prediction"),
        )


CLIPS = {
    "none": ({"clip_sample": False}, {}, {}),
    "keep_eps": ({"clip_sample": True}, {}, {"clip": "keep_eps"}),
    "recompute": ({"clip_sample": True}, {"use_clipped_model_output": True}, {"clip": "recompute"}),
    "threshold": (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1e9},
        {"use_clipped_model_output": True},
        {"clip": "recompute", "dynamic_threshold": 0.7},
    ),
}


@pytest.mark.parametrize(
    ("prediction", "clip"), [("eps", clip) for clip in CLIPS] + [("v", "recompute"), ("x0", "keep_eps")]
)
def test_sample_agrees_with_ddim_of_diffusers(prediction, clip):
    """The compiled scan with its readings of the network and its clipping, beside their step."""
    theirs_prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    config, step_options, options = CLIPS[clip]
    schedule = SCHEDULES["linear"]
    table = ddim(schedule, timesteps.trailing(schedule, 10))
    theirs = library("DDIM", "linear", 10, timestep_spacing="trailing", prediction_type=theirs_prediction, **config)

    def answer(x, t, xp):
        return xp.sin(2 * x + t / 300) + 0.3 * xp.roll(x, 1, axis=-1)

    sample = torch.from_numpy(start())
    for t in theirs.timesteps:
        output = torch.from_numpy(answer(sample.numpy(), float(t) + 1, np))
        sample = theirs.step(output, t, sample, **step_options).prev_sample
    with jax.enable_x64(True):
        ours = diffusion.sample(
            lambda params, x, t, cond: answer(x, jnp.reshape(t, (-1, 1, 1)), jnp),
            {},
            table,
            jax.random.key(0),
            SHAPE[0],
            SHAPE[1:],
            prediction=prediction,
            x_init=jnp.asarray(start()),
            **options,
        )
    agree([np.asarray(ours)], [sample.numpy()])
