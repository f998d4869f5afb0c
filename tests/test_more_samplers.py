"""Laws of the stochastic and the singlestep solvers that other libraries offer: orders, exact moments, identities."""

from itertools import pairwise

import numpy as np
import pytest
from reference import mixture_denoiser, refused
from scipy.integrate import quad
from trajectories import grid as grid_of
from trajectories import observed_order, run_table, start_states, uniform_lambdas, uniform_rhos, warped_lambdas

from diffusion import schedules, timesteps
from diffusion.solvers import (
    ddim,
    deis,
    dpm_solver,
    dpm_solver_multistep,
    dpm_solver_pp,
    dpm_solver_pp_sde,
    dpm_solver_pp_singlestep,
    edm,
    er_sde,
    euler_ancestral,
    gaussian_moments,
    heun,
    restart,
    rk,
    sa_solver,
    tcd,
    unipc,
)

LINEAR = schedules.linear()
FLOW = schedules.rectified_flow()
ZERO_SNR = schedules.zero_terminal_snr(schedules.scaled_linear())
singlestep = pytest.mark.parametrize("solver", [dpm_solver, dpm_solver_pp_singlestep])


def same(one, other, tolerance=1e-13):
    """Both tables make the same of the same, whatever their registers hold."""
    assert one.nfe == other.nfe
    x = np.linspace(-2, 2, 7)
    z = np.random.default_rng(0).standard_normal((one.nfe, x.size))
    np.testing.assert_allclose(run_table(one, x, z=z), run_table(other, x, z=z), rtol=0, atol=tolerance)


# Deterministic solvers: the order that is stated


@singlestep
@pytest.mark.parametrize("variant", ["official", "exact", "midpoint"])
@pytest.mark.parametrize(("order", "inner"), [(2, (0.3,)), (3, ()), (3, (0.4, 2 / 3))])
@pytest.mark.parametrize("lambdas", [uniform_lambdas, warped_lambdas], ids=["uniform", "warped"])
def test_singlestep_variants_have_their_order_wherever_the_inner_calls_are(solver, variant, order, inner, lambdas):
    """diffusers' midpoint is of third order, too: the inner evaluation errs by h^3 times a weight of h."""
    measured, _ = observed_order(lambda tau: solver(LINEAR, tau, order, variant=variant, inner=inner), LINEAR, lambdas)
    assert abs(measured - order) < 0.35


@singlestep
@pytest.mark.parametrize("calls", ["grid", "fast"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_solver_that_spends_its_calls_by_the_times_of_tau_has_its_order(solver, calls, order):
    """With numbers of steps of which order 3 leaves one of order 2: in one step it errs no more than all the others."""

    def build(tau):
        return solver(LINEAR, tau, order, variant="exact", calls=calls)

    measured, _ = observed_order(build, LINEAR, uniform_lambdas, steps=(47, 95, 191))
    assert abs(measured - order) < 0.4


@pytest.mark.parametrize(("basis", "schedule"), [("rho", LINEAR), ("flow", LINEAR), ("flow", FLOW)])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("lambdas", [uniform_lambdas, uniform_rhos], ids=["lambda", "rho"])
def test_runge_kutta_methods_have_their_order(basis, schedule, order, lambdas):
    measured, _ = observed_order(lambda tau: rk(schedule, tau, order, basis), schedule, lambdas, steps=(64, 128, 256))
    assert abs(measured - order) < 0.3


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["exact", "official"])
def test_multistep_dpm_solver_on_eps_has_its_order_from_exact_values(order, variant):
    def build(tau):
        return dpm_solver_multistep(LINEAR, tau, order, variant=variant, lower_order_final=False)

    measured, _ = observed_order(build, LINEAR, warped_lambdas, exact_history=order - 1)
    wanted = 2 if (order, variant) == (3, "official") else order  # it halves the second difference, as 3M does
    assert abs(measured - wanted) < 0.25


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_multistep_dpm_solver_is_deis_in_lambda(order):
    tau = timesteps.log_snr(LINEAR, 9)
    for lowered in (True, False):
        one = dpm_solver_multistep(LINEAR, tau, order, variant="exact", lower_order_final=lowered)
        np.testing.assert_allclose(one.update, deis(LINEAR, tau, order, lower_order_final=lowered).update, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_on_eps_corrects_to_one_order_more(order):
    """Without its corrector it is DEIS in lambda."""
    tau = timesteps.log_snr(LINEAR, 9)
    plain = unipc(LINEAR, tau, order, "exact", basis="eps", disable_corrector=range(9))
    np.testing.assert_allclose(plain.update, deis(LINEAR, tau, order).update, atol=1e-11)

    def errors(corrected):
        def build(tau):
            skipped = () if corrected else range(len(tau) - 1)
            return unipc(LINEAR, tau, order, "exact", lower_order_final=False, disable_corrector=skipped, basis="eps")

        return observed_order(build, LINEAR, uniform_lambdas, steps=(80, 160))[1]

    assert errors(corrected=True)[-1] < 0.3 * errors(corrected=False)[-1]


def test_orders_of_each_step_are_those_given():
    tau = timesteps.uniform(LINEAR, 6)
    given = [1, 2, 3, 3, 2, 1]
    table = deis(LINEAR, tau, given)
    full, lowered = deis(LINEAR, tau, 3, lower_order_final=False), deis(LINEAR, tau, 3)
    np.testing.assert_array_equal(table.update[2:4], full.update[2:4])
    np.testing.assert_array_equal(table.update, lowered.update)
    mixed = dpm_solver_pp_singlestep(LINEAR, tau, [3, 2, 1, 2, 3, 1])
    assert mixed.nfe == 12
    second = dpm_solver_pp_singlestep(LINEAR, tau, 2)
    np.testing.assert_allclose(mixed.update[3:5, :2, [0, 1, 3]], second.update[2:4][:, :, [0, 1, 2]], atol=1e-15)


@singlestep
def test_every_call_asked_for_is_spent(solver):
    for steps in range(1, 14):
        for order in (1, 2, 3):
            for calls in ("grid", "fast"):
                assert solver(LINEAR, timesteps.uniform(LINEAR, steps), order, calls=calls).nfe == steps
    np.testing.assert_allclose(
        solver(LINEAR, timesteps.uniform(LINEAR, 6), [2, 3, 1], calls="grid").t, timesteps.uniform(LINEAR, 6)[:-1]
    )


def test_dpm_solver_fast_has_steps_of_equal_length_in_lambda():
    table = dpm_solver(LINEAR, timesteps.log_snr(LINEAR, 9), 3, calls="fast")  # 8 calls: orders 3, 3, 2
    lambdas = LINEAR.half_log_snr(table.t)
    thirds = np.linspace(lambdas[0], lambdas[-1], 10)
    np.testing.assert_allclose(lambdas[:7], thirds[:7], atol=1e-10)
    np.testing.assert_allclose(lambdas[7], (thirds[6] + thirds[9]) / 2, atol=1e-10)


# Starts at zero signal


def test_heun_on_a_flow_starts_at_zero_signal_with_the_velocity():
    """Written out for a rectified flow, x = (1 - s) x_0 + s eps, whose velocity is (x - D) / s."""
    tau = timesteps.uniform(FLOW, 7)
    x = np.linspace(-2, 2, 9)
    s = np.asarray(tau) / FLOW.num_timesteps
    want = x
    for at, to in pairwise(s[:-1]):
        v = (want - mixture_denoiser(want, 1 - at, at)) / at
        ahead = want + (to - at) * v
        want = want + (to - at) / 2 * (v + (ahead - mixture_denoiser(ahead, 1 - to, to)) / to)
    table = rk(FLOW, tau, 2, "flow")
    np.testing.assert_allclose(run_table(table, x, stages=table.nfe - 1), want, atol=1e-12)
    with refused("zero.*start tau lower"):
        rk(FLOW, tau, 2)


@pytest.mark.parametrize("build", [dpm_solver_pp_sde, sa_solver, dpm_solver_pp_singlestep])
def test_the_x0_basis_starts_at_zero_signal_with_all_noise_anew(build):
    tau = timesteps.uniform(ZERO_SNR, 5)
    options = {"noisy": (0, 1)} if build is sa_solver else {"eta": 1.0}
    first = build(ZERO_SNR, tau, **options).update[0, 0]
    np.testing.assert_allclose(first[[0, -2]], ddim(ZERO_SNR, tau, 1.0).update[0, 0, :2], atol=1e-14)


# Noise: what is drawn keeps the variance


STOCHASTIC = {
    "dpm_2_ancestral": (dpm_solver, {"eta": 1.0}),
    "dpm_3_ancestral": (dpm_solver, {"order": 3, "eta": 0.5}),
    "dpmpp_2s_ancestral": (dpm_solver_pp_singlestep, {"eta": 1.0}),
    "dpmpp_sde": (dpm_solver_pp_sde, {}),
    "dpmpp_sde-sde": (dpm_solver_pp_sde, {"path": "sde"}),
    "dpmpp_sde-independent": (dpm_solver_pp_sde, {"path": "independent"}),
    "sde-dpmsolver": (dpm_solver_multistep, {"sde_eta": 1.0}),
    "sa_solver": (sa_solver, {}),
    "sa_solver-everywhere": (sa_solver, {"sde_eta": 0.5, "noisy": (0, 1), "predictor_order": 3, "corrector_order": 3}),
    "er_sde": (er_sde, {}),
    "er_sde-sde": (er_sde, {"kind": "sde", "order": 2}),
    "restart": (restart, {}),
    "edm-euler": (edm, {"s_churn": 5.0, "s_max": 10.0, "step": "euler"}),
    "edm-dpm_2": (edm, {"s_churn": 5.0, "s_max": 10.0, "step": "dpm_2"}),
    "tcd": (tcd, {}),
}
every_stochastic = pytest.mark.parametrize(("build", "options"), STOCHASTIC.values(), ids=STOCHASTIC.keys())


@every_stochastic
def test_moments_on_gaussian_data_tend_to_those_of_the_data(build, options):
    """Exact propagation through the table, no sampling; from a start with the moments of the data noised.

    Below 5e-4 the last step, to t = 0, counts: what it returns has the variance of D.
    """
    mean, variance = 0.3, 0.25
    errors = []
    for steps in (25, 50, 100):
        table = build(LINEAR, timesteps.log_snr(LINEAR, steps), **options)
        a, n = table.signal[0], table.noise[0]
        start = (a * mean, a**2 * variance + n**2)
        got = gaussian_moments(table, mean, variance, start)
        errors.append(np.abs(np.subtract(got, (mean, variance))).max())
    if build is tcd:  # goes past the next time by a share of it, however short the steps are
        assert errors[0] > errors[1] > errors[2]
        return
    assert errors[-1] < 0.04
    assert all(after < max(before / 1.6, 5e-4) for before, after in pairwise(errors))


@every_stochastic
def test_a_point_mass_is_sampled_exactly(build, options):
    table = build(LINEAR, timesteps.log_snr(LINEAR, 12), **options)
    np.testing.assert_allclose(gaussian_moments(table, 0.4, 0.0), (0.4, 0.0), atol=1e-11)


@pytest.mark.parametrize("known", [0.7, -1.3])
@every_stochastic
def test_a_known_x0_leaves_the_marginals_of_the_forward_process(build, options, known):
    """With D = x_0 whatever x is, x at every call is N(a_t x_0, n_t^2): nothing is drawn too much or too little.

    But for the SDE in the eps basis, which takes eps to be constant where x_0 is.
    """
    if build is dpm_solver_multistep:
        return
    table = build(LINEAR, timesteps.log_snr(LINEAR, 8), **options)
    registers = np.zeros((table.num_registers, 2 + table.nfe))  # as linear forms in (1, eps, z_1, z_2, ...)
    registers[0, :2] = table.signal[0] * known, table.noise[0]
    for i in range(table.nfe):
        np.testing.assert_allclose(registers[0, 0], table.signal[i] * known, atol=1e-10)
        np.testing.assert_allclose(np.sum(registers[0, 1:] ** 2), table.noise[i] ** 2, rtol=1e-8)
        known_form, fresh = np.zeros((2, 2 + table.nfe))
        known_form[0], fresh[2 + i] = known, 1
        registers = table.update[i] @ np.stack([*registers, known_form, fresh])


def test_s_noise_scales_the_noise_alone():
    tau = timesteps.log_snr(LINEAR, 6)
    for build, options in (
        (euler_ancestral, {}),
        (dpm_solver, {"eta": 1.0}),
        (dpm_solver_pp_singlestep, {"eta": 0.7}),
        (dpm_solver_pp, {"sde_eta": 1.0}),
        (dpm_solver_multistep, {"sde_eta": 0.5}),
        (dpm_solver_pp_sde, {}),
        (er_sde, {}),
    ):
        one, two = (build(LINEAR, tau, s_noise=s, **options).update for s in (1.0, 1.5))
        np.testing.assert_array_equal(one[..., :-1], two[..., :-1])
        np.testing.assert_allclose(two[..., -1], 1.5 * one[..., -1], atol=1e-15)
        assert np.any(one[..., -1])


def test_without_noise_stochastic_solvers_are_the_deterministic_ones():
    tau = timesteps.log_snr(LINEAR, 7)
    same(dpm_solver_pp_sde(LINEAR, tau, eta=0.0), dpm_solver_pp_singlestep(LINEAR, tau, 2))
    same(edm(LINEAR, tau, step="dpm_2"), dpm_solver(LINEAR, tau, 2))
    same(edm(LINEAR, tau, step="euler"), ddim(LINEAR, tau))
    same(restart(LINEAR, tau, repeats=0), heun(LINEAR, tau))
    same(rk(LINEAR, tau, 2), heun(LINEAR, tau), 1e-12)
    same(tcd(LINEAR, tau, eta=0.0), ddim(LINEAR, tau))
    same(er_sde(LINEAR, tau, 1, "ode"), ddim(LINEAR, tau))
    same(er_sde(LINEAR, tau, 3, eta=0.0), er_sde(LINEAR, tau, 3, "ode"))
    same(sa_solver(LINEAR, tau, 2, 3, sde_eta=0.0), unipc(LINEAR, tau, 2, "bh1"), 1e-12)
    same(sa_solver(LINEAR, tau, 2, 0, 1.0, (0, 1), "exact"), dpm_solver_pp(LINEAR, tau, 2, 1.0), 1e-12)


@pytest.mark.parametrize("kind", ["er", "sde", "ode"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_the_papers_formula(order, kind):
    """Algorithms 1 to 3 of arXiv:2309.06169 in y = x / a, with the integrals by adaptive quadrature."""
    tau = timesteps.karras(LINEAR, 7)
    phi = {
        "er": lambda s: s * (np.exp(s**0.3) + 10),
        "sde": lambda s: s**2,
        "ode": lambda s: s,
    }[kind]
    a, n = LINEAR.at(tau)
    sigma, x = n / a, start_states(LINEAR, tau)
    z = np.random.default_rng(0).standard_normal((7, x.size))
    y, past, slopes = x / a[0], [], []
    for i, (t, s) in enumerate(pairwise(sigma[:-1])):
        D = mixture_denoiser(a[i] * y, a[i], n[i])
        past.append(D)
        r = phi(s) / phi(t)
        y = r * y + (1 - r) * D + (np.sqrt(s**2 - r**2 * t**2) * z[i] if kind != "ode" else 0)
        if i:
            slopes.append((D - past[-2]) / (t - sigma[i - 1]))
        if i and order > 1:
            y = y + (s - t + phi(s) * quad(lambda v: 1 / phi(v), s, t, epsabs=1e-13)[0]) * slopes[-1]
        if i > 1 and order > 2:
            bend = (slopes[-1] - slopes[-2]) / ((t - sigma[i - 2]) / 2)
            whole = quad(lambda v, t=t: (v - t) / phi(v), s, t, epsabs=1e-13)[0]
            y = y + ((s - t) ** 2 / 2 + phi(s) * whole) * bend
    table = er_sde(LINEAR, tau, order, kind)
    np.testing.assert_allclose(run_table(table, x, z=z, stages=6), a[-2] * y, rtol=0, atol=1e-9)


def test_restart_is_algorithm_1():
    """Down by Heun, up by one noise, and down again."""
    tau = grid_of(LINEAR, -np.log([20.0, 5.0, 1.0, 0.6, 0.3, 0.05]))
    table = restart(LINEAR, tau, 0.3, 1.0, repeats=2, s_noise=1.1)
    a, n = LINEAR.at(tau[:-1])
    sigma, x = n / a, start_states(LINEAR, tau)
    z = np.random.default_rng(0).standard_normal((table.nfe, x.size))

    def eps(y, i):
        return (y - mixture_denoiser(a[i] * y, a[i], n[i])) / sigma[i]

    y, calls = x / a[0], 0
    ways = [range(4), range(2, 4), range(2, 4)]
    for k, way in enumerate(ways):
        for i in way:
            first = eps(y, i)
            second = eps(y + (sigma[i + 1] - sigma[i]) * first, i + 1)
            y, calls = y + (sigma[i + 1] - sigma[i]) * (first + second) / 2, calls + 2
        if k < 2:
            y = y + 1.1 * np.sqrt(sigma[2] ** 2 - sigma[4] ** 2) * z[calls - 1]
    got = run_table(table, x, z=z, stages=calls)
    np.testing.assert_allclose(got, a[4] * y, atol=1e-10)
    assert table.nfe == 2 * (6 + 2 * 2) - 1


def test_the_noise_of_a_whole_step_belongs_to_that_of_its_part_as_in_the_exact_solution():
    """Of the SDE with D held, whose solution has noise e^{-lambda} n times a Brownian path in e^{2 lambda}."""
    tau = grid_of(LINEAR, np.array([-1.0, 0.5]))
    table = dpm_solver_pp_sde(LINEAR, tau, r=0.4, path="sde")
    part, whole, rest = table.update[0, 0, -1], table.update[0, 1, -1], table.update[1, 0, -1]
    levels = np.array([-1.0, -0.4, 0.5])
    (_, n) = LINEAR.at(LINEAR.time_of(levels))
    grown = n * np.exp(-levels)
    time = np.exp(2 * levels)
    np.testing.assert_allclose(part**2, (grown[1]) ** 2 * (time[1] - time[0]), rtol=1e-10)
    np.testing.assert_allclose(whole**2 + rest**2, grown[2] ** 2 * (time[2] - time[0]), rtol=1e-10)
    np.testing.assert_allclose(part * whole, grown[1] * grown[2] * (time[1] - time[0]), rtol=1e-10)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_entry_is_finite_on_every_grid_and_the_end_returns_the_estimate(name):
    build, options = STOCHASTIC[name]
    for schedule in (LINEAR, schedules.cosine(), FLOW):
        for grid, make in timesteps.GRIDS.items():
            if schedule is FLOW and (grid in ("log_snr", "karras", "polyexponential", "kl_optimal")):
                continue
            for steps in (1, 2, 7):
                tau = make(schedule, steps)
                if schedule.at(tau[0])[0] == 0 and build in (dpm_solver, dpm_solver_multistep, er_sde, restart, edm):
                    with refused("zero.*start tau lower"):
                        build(schedule, tau, **options)
                    continue
                table = build(schedule, tau, **options)
                assert np.all(np.isfinite(table.update))
                assert np.all(table.t > 0)
                last = np.zeros(table.num_registers + 2)
                last[-2] = 1
                np.testing.assert_allclose(table.update[-1, 0], last, atol=1e-12)


def test_wrong_options_are_refused_in_one_line():
    tau = timesteps.log_snr(LINEAR, 6)
    for text, build, options in (
        ("eta is 1.5.*0..1", dpm_solver, {"eta": 1.5}),
        ("s_churn is 0, so that no noise is added", edm, {"s_noise": 1.01}),
        ("s_churn is 0, so that no noise is added", edm, {"s_min": 0.1}),
        ("no noise that it acts on; give eta above 0", euler_ancestral, {"eta": 0.0, "s_noise": 1.1}),
        ("no noise that it acts on; give eta above 0", dpm_solver, {"s_noise": 1.1}),
        ("no noise that it acts on; give sde_eta above 0", dpm_solver_pp, {"s_noise": 1.1}),
        ("no noise that it acts on; give sde_eta above 0", dpm_solver_multistep, {"s_noise": 1.1}),
        ("no noise that it acts on; give another kind", er_sde, {"kind": "ode", "s_noise": 1.1}),
        ("no noise that it acts on; give repeats above 0", restart, {"repeats": 0, "s_noise": 1.1}),
        ("s_noise is -1", dpm_solver_pp_singlestep, {"s_noise": -1}),
        ("variant is 'taylor'", dpm_solver, {"variant": "taylor"}),
        ("calls is 'fas'; did you mean 'fast'", dpm_solver, {"calls": "fas"}),
        ("inner is .*order 3", dpm_solver, {"order": 3, "inner": (0.5,)}),
        ("inner is .*one share", dpm_solver, {"inner": (1.5,)}),
        ("inner is .*leave inner out", dpm_solver, {"inner": (0.5,), "calls": "grid"}),
        ("order names 2 steps and tau has 6", dpm_solver, {"order": [2, 1]}),
        ("order of step 5 is 2.*order 1", dpm_solver, {"order": [1, 1, 1, 1, 1, 2]}),
        ("must add up to 6", dpm_solver, {"order": [3, 1], "calls": "grid"}),
        ("each must be a whole number in 1..3", dpm_solver, {"order": [4, 1, 1], "calls": "fast"}),
        ("path is 'brown'", dpm_solver_pp_sde, {"path": "brown"}),
        ("r is 1", dpm_solver_pp_sde, {"r": 1.0}),
        ("step is 'euller'.*'euler'", edm, {"step": "euller"}),
        ("kind is 'vp'", er_sde, {"kind": "vp"}),
        ("basis is 'lambda'", unipc, {"basis": "lambda"}),
        ("end is 700", unipc, {"end": 700}),
        ("noisy is .*between 0 and 1", sa_solver, {"noisy": (0.8, 0.2)}),
        ("order is 5.*0..4", sa_solver, {"corrector_order": 5}),
        ("repeats is -1", restart, {"repeats": -1}),
        ("has .* network calls; give fewer, up to 1,000,000", restart, {"repeats": 10**9}),
        ("s_min is 2.*s_max", restart, {"s_min": 2.0}),
        ("order is 1.*2..4", rk, {"order": 1}),
    ):
        with refused(text):
            build(LINEAR, tau, **options)
    with refused("infinite at t = 1000; take calls 'grid'"):
        dpm_solver_pp_singlestep(ZERO_SNR, timesteps.uniform(ZERO_SNR, 5), calls="fast")
    for build in (er_sde, dpm_solver_multistep, restart):
        with refused("zero.*start tau lower"):
            build(ZERO_SNR, timesteps.uniform(ZERO_SNR, 5))
