"""More of diffusers' schedulers: ancestral and singlestep ones, the eps basis, SA-Solver, TCD, Heun on a flow."""

import numpy as np
import pytest
from sidebyside import (
    SCHEDULES,
    agree,
    by_flow_sigma,
    by_sigma,
    diffusers,
    fresh,
    in_double,
    library,
    library_path,
    network,
    sigma_grid,
    start,
    table_path,
    whole_grid,
)

from diffusion import schedules, timesteps
from diffusion.solvers import (
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp_singlestep,
    rk,
    sa_solver,
    tcd,
    unipc,
)
from diffusion.timesteps import noise

AysSchedules = pytest.importorskip("diffusers.schedulers.scheduling_utils").AysSchedules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = (1, 2, 5, 7, 10, 25)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@pytest.fixture(autouse=True)
def double():
    with in_double():
        yield


def both(name, table, theirs, z=None, clock=None, **options):
    """Runs a table and a scheduler on the same network and noise, and compares all that they see."""
    schedule = SCHEDULES[name]
    clock = {"clock": clock} if clock else {}
    agree(
        table_path(table, network(schedule), start(), z),
        library_path(theirs, schedule, network(schedule), start(), z, **clock, **options),
    )


def by_inner_sigma(schedule, scheduler, t):
    """As `by_sigma`, for the scheduler that keeps the sigma of a step's second call one place earlier."""
    inner = scheduler.step_index is not None and not scheduler.state_in_first_order
    sigma = (
        scheduler.sigmas_interpol[scheduler.step_index - 1] if inner else scheduler.sigmas[scheduler.step_index or 0]
    )
    return float(schedule.time_of(-np.log(float(sigma))))


@every_schedule
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_2_ancestral_agrees_with_diffusers(name, spacing):
    schedule = SCHEDULES[name]
    for steps in (5, 10, 25):  # over longer steps theirs loses digits in sigma_s^2 - sigma_up^2
        theirs = library("KDPM2AncestralDiscrete", name, steps, timestep_spacing=spacing)
        z = fresh(2 * steps - 1)
        z[::2] = 0  # noise is drawn after the second call of a step
        both(name, dpm_solver(schedule, sigma_grid(schedule, theirs), eta=1.0), theirs, z, by_inner_sigma)


@every_schedule
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("spaced", [{}, {"use_karras_sigmas": True}], ids=["even", "karras"])
def test_singlestep_schedulers_spend_one_call_at_each_time(name, order, kind, spaced):
    schedule = SCHEDULES[name]
    for calls in (1, 2, 3, 4, 5, 6, 11):
        theirs = library("DPMSolverSinglestep", name, calls, solver_order=order, solver_type=kind, **spaced)
        tau = sigma_grid(schedule, theirs)
        variant = {"midpoint": "midpoint", "heun": "exact"}[kind]
        table = dpm_solver_pp_singlestep(schedule, tau, order, variant=variant, calls="grid")
        assert table.nfe == calls
        both(name, table, theirs, clock=by_sigma)


@every_schedule
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_in_the_eps_basis_agrees_with_diffusers(name, order, variant):
    schedule = SCHEDULES[name]
    options = {"solver_type": variant, "predict_x0": False, "final_sigmas_type": "sigma_min"}
    for steps in STEPS:
        theirs = library("UniPCMultistep", name, steps, solver_order=order, **options)
        tau = whole_grid(schedule, theirs)
        # Theirs lowers the orders 3, 2, 1 at the end; ours may, too, as the last step is of finite length.
        both(name, unipc(schedule, tau, order, variant, basis="eps", end=1), theirs)


@every_schedule
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_multistep_dpm_solver_in_the_eps_basis_agrees_with_diffusers(name, order, kind):
    schedule, variant = SCHEDULES[name], {"midpoint": "official", "heun": "exact"}[kind]
    for steps in (*STEPS, 15):
        for algorithm, sde_eta in (("dpmsolver", 0.0), ("sde-dpmsolver", 1.0)):
            if algorithm == "sde-dpmsolver" and order == 3:
                continue  # theirs has none
            options = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min", "solver_type": kind}
            theirs = library("DPMSolverMultistep", name, steps, solver_order=order, **options)
            tau, ours = whole_grid(schedule, theirs), {"lower_order_final": steps < 15, "end": 1}
            table = dpm_solver_multistep(schedule, tau, order, sde_eta, variant, **ours)
            both(name, table, theirs, fresh(steps))


@every_schedule
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_with_lowered_orders_agrees_with_diffusers(name, order):
    schedule = SCHEDULES[name]
    for steps in STEPS:
        theirs = library("DEISMultistep", name, steps, solver_order=order)
        lowered = steps < 15
        both(name, deis(schedule, whole_grid(schedule, theirs), order, lower_order_final=lowered, end=1), theirs)


@every_schedule
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (1, 2), (2, 2), (2, 1), (3, 3), (3, 4), (2, 4)])
def test_sa_solver_agrees_with_diffusers(name, predictor, corrector):
    """Theirs knows no end but sigma_min; ours goes on to 0, so the orders are not lowered."""
    schedule = SCHEDULES[name]
    for steps in STEPS:
        orders = {"predictor_order": predictor, "corrector_order": corrector, "lower_order_final": False}
        theirs = library("SASolver", name, steps, **orders)
        table = sa_solver(schedule, whole_grid(schedule, theirs, end=(1, 0)), **orders)
        z = fresh(steps + 1)
        ours = table_path(table, network(schedule), start(), z)
        # Theirs writes differences of polynomials out, which cancel over short steps.
        agree(ours[:-1], library_path(theirs, schedule, network(schedule), start(), z), tolerance=1e-6)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_agrees_with_diffusers(name, eta):
    schedule = SCHEDULES[name]
    for steps in (1, 2, 4, 7, 10):
        theirs = library("TCD", name, steps)
        z = fresh(steps)
        both(name, tcd(schedule, whole_grid(schedule, theirs), eta, end=1), theirs, z, eta=eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_on_a_flow_from_zero_signal_agrees_with_diffusers(shift):
    schedule = schedules.rectified_flow(1000)
    for steps in STEPS:
        theirs = library("FlowMatchHeunDiscrete", "flow", steps, shift=shift)
        tau = timesteps.explicit(schedule, 1000 * np.unique(theirs.sigmas.numpy())[:0:-1])
        agree(
            table_path(rk(schedule, tau, 2, "flow"), network(schedule), start()),
            library_path(theirs, schedule, network(schedule), start(), clock=by_flow_sigma, output="flow_prediction"),
        )


def test_grids_of_sigmas_agree_with_diffusers():
    schedule = SCHEDULES["linear"]
    for steps in (2, 5, 10):
        theirs = library("EulerDiscrete", "linear", steps, use_beta_sigmas=True).sigmas.numpy()[:-1]
        tau = timesteps.beta(schedule, steps, of="sigma")
        np.testing.assert_allclose(np.exp(-schedule.half_log_snr(tau[:-1])), theirs, rtol=1e-7)
    sd = SCHEDULES["scaled_linear"]
    for model, name in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        theirs = AysSchedules[f"{name}Sigmas"]
        assert theirs[:-1] == list(noise.AYS[model][:-1])
        # Their timesteps are whole, and made of levels with more digits than are published.
        np.testing.assert_allclose(timesteps.ays(sd, 10, model)[:-1] - 1, AysSchedules[f"{name}Timesteps"], atol=1.5)
    assert AysSchedules["StableDiffusionVideoSigmas"][:-1] == list(noise.AYS["svd"][:-1])


def test_shifted_grids_agree_with_diffusers():
    flow = schedules.rectified_flow(1000)
    for steps in (2, 5, 10):
        for shift in (1.0, 3.0):
            theirs = library("FlowMatchEulerDiscrete", "flow", steps, shift=shift)
            lowest = shift / 1000 / (1 + (shift - 1) / 1000)  # theirs shifts the range, and then the times
            tau = timesteps.shifted(flow, steps, shift, lowest=lowest)
            np.testing.assert_allclose(tau / 1000, theirs.sigmas.numpy(), rtol=1e-7, atol=1e-12)
        for options, given in (({}, {}), ({"shift_terminal": 0.1}, {"terminal": 0.1})):
            theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
            theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=0.8)
            tau = timesteps.shifted(flow, steps, mu=0.8, **given)
            np.testing.assert_allclose(tau / 1000, theirs.sigmas.numpy(), rtol=1e-6, atol=1e-12)
