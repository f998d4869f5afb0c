"""Where our tables differ from diffusers' schedulers on purpose: what theirs does, and the law that ours keeps."""

import numpy as np
import pytest
from scipy.integrate import quad
from sidebyside import (
    SCHEDULES,
    by_sigma,
    difference,
    fresh,
    ideal,
    in_double,
    library,
    library_path,
    network,
    put_sigmas,
    sigma_grid,
    start,
    table_path,
    whole_grid,
)
from trajectories import exact_states, grid, start_states, uniform_lambdas

from diffusion import schedules, timesteps
from diffusion.solvers import ddim, ddpm, dpm_solver_pp, unipc
from diffusion.solvers.adams import deis, plms, pndm
from diffusion.solvers.singlestep import dpm_solver_pp_singlestep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LINEAR = SCHEDULES["linear"]


@pytest.fixture
def double():
    with in_double():
        yield


double_precision = pytest.mark.usefixtures("double")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIM", {"clip_sample": False}),
        ("DPMSolverMultistep", {"solver_order": 3}),
        ("UniPCMultistep", {"solver_order": 3}),
        ("DEISMultistep", {"solver_order": 3, "lower_order_final": False}),
    ],
)
def test_single_precision_moves_diffusers_away_from_our_tables(kind, options):
    """As installed, not widened to float64: its float32 tables of alpha_bar cost 1e-7 to 1e-4 in what is sampled."""
    theirs = library(kind, "linear", 10, timestep_spacing="trailing", **options)
    tau = whole_grid(LINEAR, theirs)
    table, shown = {
        "DDIM": lambda: (ddim(LINEAR, tau), slice(None)),
        "DPMSolverMultistep": lambda: (dpm_solver_pp(LINEAR, tau, 3, variant="official"), slice(None)),
        "UniPCMultistep": lambda: (unipc(LINEAR, tau, 3), slice(None)),
        "DEISMultistep": lambda: (deis(LINEAR, [*tau[:-1], 1, 0], 3, lower_order_final=False), slice(-1)),
    }[kind]()
    path = library_path(theirs, LINEAR, network(LINEAR), start())
    assert 1e-8 < difference(table_path(table, network(LINEAR), start())[shown], path) < 1e-3


def off_the_marginals(path, schedule, times, x0, eps):
    """How far the x seen at each time is from a_t x_0 + n_t eps, where the network knows x_0."""
    signal, noise = (v[:, None, None, None] for v in schedule.at(times))
    return float(np.max(np.abs(np.array(path[: len(times)]) - (signal * x0 + noise * eps))))


WRONG_TIMES = [
    ("DDIM", 10, {"timestep_spacing": "linspace"}),
    ("DDIM", 7, {"timestep_spacing": "trailing"}),
    ("DDIM", 30, {"timestep_spacing": "trailing"}),
    ("PNDM", 10, {"timestep_spacing": "linspace", "skip_prk_steps": True}),
    ("PNDM", 8, {"timestep_spacing": "leading"}),
]


@double_precision
@pytest.mark.parametrize(("kind", "steps", "options"), WRONG_TIMES)
def test_diffusers_step_past_the_next_grid_point_and_ours_do_not(kind, steps, options):
    """Their DDIM and PNDM step to t - T // S, whatever comes next in the grid (diffusers#12633, #9261).

    So the network is told one noise level and given another. PNDM's half step of T // S // 2 errs in the same way where
    T // S is odd. With a network that knows x_0 the truth is known: x_t = a_t x_0 + n_t eps at every call.
    """
    fixed = {"DDIM": {"clip_sample": False}, "PNDM": {"set_alpha_to_one": True}}[kind]
    theirs = library(kind, "linear", steps, **fixed, **options)
    x0, eps = 0.3 * start(), start(1)
    if kind == "DDIM":
        table = ddim(LINEAR, whole_grid(LINEAR, theirs))
    elif options.get("skip_prk_steps"):
        table = plms(LINEAR, [*np.unique(theirs.timesteps.numpy() + 1)[::-1], 0])
    else:
        table = pndm(LINEAR, timesteps.leading(LINEAR, steps))
    signal, noise = LINEAR.at(table.t[0])
    x = signal * x0 + noise * eps
    known = lambda seen, t: x0  # noqa: E731
    assert off_the_marginals(table_path(table, known, x), LINEAR, table.t, x0, eps) < 1e-10
    path = library_path(theirs, LINEAR, known, x)
    assert off_the_marginals(path, LINEAR, theirs.timesteps.numpy() + 1, x0, eps) > 1e-4


@double_precision
def test_diffusers_add_noise_in_the_last_step():
    """DDPM with fixed_large decides by t > 0 whether to inject noise, and `trailing` ends above 0.

    The last step must return its estimate of x_0, as ours does.
    """
    theirs = library("DDPM", "linear", 10, timestep_spacing="trailing", clip_sample=False, variance_type="fixed_large")
    table, z, x0 = ddpm(LINEAR, whole_grid(LINEAR, theirs), "large"), fresh(10), network(LINEAR)
    ours, path = table_path(table, x0, start(), z), library_path(theirs, LINEAR, x0, start(), z)
    np.testing.assert_allclose(ours[-2], path[-2], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(ours[-1], x0(ours[-2], table.t[-1]))
    beta = 1 - LINEAR.alpha_bar[int(table.t[-1])]
    np.testing.assert_allclose(path[-1] - ours[-1], np.sqrt(beta) * z[-1], rtol=0, atol=1e-10)
    assert beta > 0.05


@double_precision
def test_diffusers_lower_the_last_orders_only_below_15_steps():
    """Ours lowers them at every number of steps, or at none: the option means what it says."""
    for steps, lowered in ((14, True), (15, False), (25, False)):
        theirs = library("DPMSolverMultistep", "linear", steps, solver_order=3, lower_order_final=True)
        path = library_path(theirs, LINEAR, network(LINEAR), start())
        for option in (True, False):
            table = dpm_solver_pp(LINEAR, whole_grid(LINEAR, theirs), 3, 0.0, "official", lower_order_final=option)
            distance = difference(table_path(table, network(LINEAR), start()), path)
            assert distance < 1e-10 if option == lowered else distance > 1e-5


def observed_order(run, steps=(40, 80, 160)):
    """Slope of the log error against the exact flow at the last call; run(tau, exact) -> what the network saw."""
    errors = []
    for number in steps:
        tau = grid(LINEAR, uniform_lambdas(number))
        x = start_states(LINEAR, tau)
        exact = exact_states(LINEAR, np.append(tau[:3], tau[-2]), x).reshape(4, 1, 1, -1)
        errors.append(np.sqrt(np.mean((run(tau, exact[:3])[-2] - exact[3]) ** 2)))
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@double_precision
def test_third_order_of_diffusers_is_of_order_2_and_our_exact_one_of_order_3():
    """The published 3M halves the second difference. Both start from exact values, or the start would decide."""

    def theirs(tau, exact):
        scheduler = library("DPMSolverMultistep", "linear", 10, solver_order=3, lower_order_final=False)
        put_sigmas(scheduler, [*np.exp(-LINEAR.half_log_snr(tau[:-1])), 0])
        return library_path(scheduler, LINEAR, ideal(LINEAR), exact[0], clock=by_sigma, exact=exact)

    def ours(variant):
        def run(tau, exact):
            table = dpm_solver_pp(LINEAR, tau, 3, variant=variant, lower_order_final=False)
            return table_path(table, ideal(LINEAR), exact[0], exact=exact)

        return run

    assert abs(observed_order(theirs) - 2) < 0.2
    assert abs(observed_order(ours("official")) - 2) < 0.2
    assert abs(observed_order(ours("exact")) - 3) < 0.2


@double_precision
def test_third_order_sde_of_diffusers_has_a_wrong_sign():
    """The weight of the second difference is (1 - e^-z - z) / z^2 - 1/2 there, for + 1/2, z = 2 h (diffusers#9104).

    It tends to -1 with the step where it should vanish, and so errs by h^2 a step: order 1. Tried on D = lambda^2 with
    no noise, where the right result is an integral: our exact solver meets it, and the published rule errs by h^3.
    """

    def lambda_squared(x, t):
        return np.full_like(x, LINEAR.half_log_snr(t) ** 2)

    errors = {"theirs": [], "official": [], "exact": []}
    for h in (0.1, 0.05):
        lambdas = -0.5 + h * np.arange(4)
        tau, end = grid(LINEAR, lambdas), lambdas[3]
        theirs = library(
            "DPMSolverMultistep",
            "linear",
            10,
            solver_order=3,
            algorithm_type="sde-dpmsolver++",
            lower_order_final=False,
        )
        put_sigmas(theirs, [*np.exp(-lambdas), 0])
        paths = {"theirs": library_path(theirs, LINEAR, lambda_squared, start(), clock=by_sigma)}
        for variant in ("official", "exact"):
            table = dpm_solver_pp(LINEAR, tau, 3, sde_eta=1.0, variant=variant, lower_order_final=False)
            paths[variant] = table_path(table, lambda_squared, start())
        (_, a), (n, n_s) = LINEAR.at(tau[2:4])
        integral = quad(lambda v, end=end: 2 * np.exp(-2 * (end - v)) * v**2, lambdas[2], end, epsabs=1e-14)[0]
        for name, path in paths.items():
            errors[name].append(np.max(np.abs(path[3] - (n_s / n * np.exp(-h) * path[2] + a * integral))))
    assert max(errors["exact"]) < 1e-12
    assert errors["theirs"][1] > 10 * errors["official"][1]
    assert 3.3 < errors["theirs"][0] / errors["theirs"][1] < 4.7
    assert 6.5 < errors["official"][0] / errors["official"][1] < 9.5


@double_precision
def test_third_order_singlestep_of_diffusers_is_another_method_of_order_3():
    """With solver_type midpoint the inner evaluation is by 2S's rule; the authors' 3S, and ours, integrates there."""

    def exact_start(tau):
        return exact_states(LINEAR, tau[:1], start_states(LINEAR, tau)).reshape(1, 1, -1)

    def both(steps):
        lambdas = uniform_lambdas(3 * steps)
        tau = np.append(grid(LINEAR, lambdas)[:-1][::3], 0)
        theirs = library("DPMSolverSinglestep", "linear", 3 * steps + 1, solver_order=3)
        put_sigmas(theirs, [*np.exp(-lambdas), 0])
        path = library_path(theirs, LINEAR, ideal(LINEAR), exact_start(tau), clock=by_sigma)
        return table_path(dpm_solver_pp_singlestep(LINEAR, tau, 3), ideal(LINEAR), exact_start(tau)), path, tau

    errors, distances = [], []
    for steps in (10, 20, 40):
        ours, path, tau = both(steps)
        exact = exact_states(LINEAR, tau[[0, -2]], exact_start(tau)[0, 0])[1]
        errors.append([np.sqrt(np.mean((p[-2] - exact) ** 2)) for p in (ours, path)])
        distances.append(difference(ours, path))
    orders = -np.polyfit(np.log([10, 20, 40]), np.log(errors), 1)[0]
    assert np.all(np.abs(orders - 3) < 0.35), orders
    assert distances[0] > 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_of_diffusers_is_not_a_number_where_ours_ends_in_the_estimate(order):
    """Their default end sigma = 0 makes h infinite, and B(h) = h times 0 is NaN; ours returns D there, as with bh2."""
    theirs = library("UniPCMultistep", "linear", 10, solver_order=order, solver_type="bh1")
    tau, x0 = whole_grid(LINEAR, theirs), network(LINEAR)
    assert np.all(np.isnan(library_path(theirs, LINEAR, x0, start())[-1]))
    ours = table_path(unipc(LINEAR, tau, order, "bh1"), x0, start())
    np.testing.assert_allclose(ours[-1], x0(ours[-2], tau[-2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"])
def test_trailing_of_diffusers_has_a_step_too_many_at_some_counts(kind):
    """Its range of floats does not always stop at 0: 62 counts in 1..1000 get one more timestep, -1 of theirs."""
    for steps in (61, 103, 121):
        theirs = library(kind, "linear", steps, timestep_spacing="trailing")
        assert theirs.timesteps.numpy()[-1] == -1
        assert len(theirs.timesteps) == steps + 1
        ours = timesteps.trailing(LINEAR, steps)
        assert ours.size == steps + 1  # the end 0 is counted here
        np.testing.assert_array_equal(ours[:-1], theirs.timesteps.numpy()[:-1] + 1)


@pytest.mark.parametrize("kind", ["DDPM", "EulerDiscrete", "HeunDiscrete"])
def test_one_step_of_diffusers_starts_at_clean_data_and_ours_at_noise(kind):
    """Their `linspace` from 0 to T - 1 is 0 where S = 1; improved DDPM's, from 1 to T, must be T."""
    assert library(kind, "linear", 1, timestep_spacing="linspace").timesteps.numpy()[0] == 0
    assert timesteps.linspace(LINEAR, 1)[0] == 1000


def test_karras_times_of_diffusers_are_whole_and_repeat():
    """The network is told a timestep that is not where its sigma is (diffusers#12771); ours is told a real one.

    The sigmas themselves agree, as far as the float32 of theirs goes.
    """
    schedule = SCHEDULES["cosine"]
    theirs = library("DPMSolverMultistep", "cosine", 25, use_karras_sigmas=True)
    told, sigmas = theirs.timesteps.numpy(), theirs.sigmas.numpy()[:-1]
    assert np.unique(told).size < told.size
    assert np.max(np.abs(np.exp(-schedule.half_log_snr(told + 1)) / sigmas - 1)) > 0.5
    ours = timesteps.karras(schedule, 25)
    assert np.all(np.diff(ours) < 0)
    np.testing.assert_allclose(np.exp(-schedule.half_log_snr(ours[:-1])), sigmas, rtol=1e-2)


@double_precision
def test_deis_of_diffusers_on_karras_sigmas_ends_with_a_step_of_no_length():
    """Its last sigma is repeated, so the last network call changes nothing and the sample keeps its noise."""
    theirs = library("DEISMultistep", "linear", 10, solver_order=2, use_karras_sigmas=True, lower_order_final=False)
    path = library_path(theirs, LINEAR, network(LINEAR), start(), clock=by_sigma)
    np.testing.assert_allclose(path[-1], path[-2], rtol=0, atol=1e-12)
    table = deis(LINEAR, sigma_grid(LINEAR, theirs), 2, lower_order_final=False)
    ours = table_path(table, network(LINEAR), start())
    assert difference(ours[:-1], path[:-1]) < 1e-10
    np.testing.assert_allclose(ours[-1], network(LINEAR)(ours[-2], table.t[-1]), rtol=0, atol=1e-12)


@double_precision
def test_zero_signal_is_replaced_by_a_little_signal_in_diffusers():
    """Their log-SNR solvers put alpha_bar_T = 2^-24; ours starts at zero signal, from noise alone, with order 1."""
    schedule = schedules.zero_terminal_snr(SCHEDULES["scaled_linear"])
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = library("DPMSolverMultistep", "scaled_linear", 10, **options)
    assert float(theirs.alphas_cumprod[-1]) == 2.0**-24
    table, x0, eps = dpm_solver_pp(schedule, whole_grid(schedule, theirs)), 0.3 * start(), start(1)
    known = lambda seen, t: x0  # noqa: E731
    assert off_the_marginals(table_path(table, known, eps), schedule, table.t, x0, eps) < 1e-10
    path = library_path(theirs, schedule, known, eps, output="v_prediction")
    assert off_the_marginals(path, schedule, table.t, x0, eps) > 1e-5
