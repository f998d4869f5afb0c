"""Laws of the solvers in the eps basis (DEIS, LMS, iPNDM, PLMS, PNDM, Heun, EDM) and of the one-step ones."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import ideal_network, mixture_denoiser, refused
from scipy.integrate import quad
from trajectories import observed_order, run_table, start_states, uniform_lambdas, uniform_rhos, warped_lambdas

import diffusion
from diffusion import schedules, solvers, timesteps
from diffusion.solvers import ddim, ddpm, gaussian_moments

LINEAR = schedules.linear()
SMALL = {
    "linear": schedules.linear(60, 1e-3, 0.3),
    "scaled_linear": schedules.scaled_linear(60, 0.01, 0.2),
    "cosine": schedules.cosine(60),
    "edm": schedules.edm(60),
    "rectified_flow": schedules.rectified_flow(60),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear(60, 0.01, 0.2)),
}
EPS_SOLVERS = {
    **{
        f"deis{p}-{b}": lambda s, tau, p=p, b=b: solvers.deis(s, tau, p, b)
        for p in range(1, 5)
        for b in ("lambda", "rho", "t")
    },
    "deis4-full": lambda s, tau: solvers.deis(s, tau, 4, lower_order_final=False),
    **{f"lms{p}": lambda s, tau, p=p: solvers.lms(s, tau, p) for p in range(1, 5)},
    **{f"ipndm{p}": lambda s, tau, p=p: solvers.ipndm(s, tau, p) for p in range(1, 5)},
    **{f"plms{p}": lambda s, tau, p=p: solvers.plms(s, tau, p) for p in range(2, 5)},
    "pndm": solvers.pndm,
    "heun": solvers.heun,
    "dpm_solver2": lambda s, tau: solvers.dpm_solver(s, tau, 2),
    "dpm_solver3": lambda s, tau: solvers.dpm_solver(s, tau, 3),
}
OTHERS = {
    "2s": lambda s, tau: solvers.dpm_solver_pp_singlestep(s, tau, 2),
    "3s": lambda s, tau: solvers.dpm_solver_pp_singlestep(s, tau, 3),
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "sigma_hat": solvers.sigma_hat,
    "consistency": solvers.consistency,
}
LOWERED = [k for k in EPS_SOLVERS if k.startswith(("deis", "heun", "dpm"))] + ["2s", "3s", "euler", "consistency"]
ALL = EPS_SOLVERS | OTHERS
warped_too = pytest.mark.parametrize("lambdas", [uniform_lambdas, warped_lambdas], ids=["uniform", "warped"])
grids = pytest.mark.parametrize(
    "tau", [timesteps.uniform(LINEAR, 9), timesteps.log_snr(LINEAR, 7)], ids=["even", "log"]
)


def deterministic(name):
    return name not in ("euler_ancestral", "sigma_hat", "consistency")


def eps_at(x, t, schedule=LINEAR):
    a, n = schedule.at(t)
    return (x - a * mixture_denoiser(x, a, n)) / n


def transfer(x, eps, t, s, schedule=LINEAR):
    """PNDM's phi, DDIM's step with any eps: x_s / a_s = x_t / a_t + (rho_s - rho_t) eps."""
    (a, n), (a_s, n_s) = schedule.at(t), schedule.at(s)
    return a_s * (x / a + (n_s / a_s - n / a) * eps)


# Convergence


@warped_too
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("basis", ["lambda", "rho"])
def test_deis_has_its_order_from_an_exact_start(basis, order, lambdas):
    def build(tau):
        return solvers.deis(LINEAR, tau, order, basis, lower_order_final=False)

    measured, _ = observed_order(build, LINEAR, lambdas, (80, 160, 320), exact_history=order - 1)
    assert abs(measured - order) < 0.2


@warped_too
@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_time_has_its_order_where_the_schedule_is_smooth_in_time(order, lambdas):
    schedule = schedules.linear(16000, 1e-4 / 16, 0.02 / 16)

    def build(tau):
        return solvers.deis(schedule, tau, order, "t", lower_order_final=False)

    measured, _ = observed_order(build, schedule, lambdas, exact_history=order - 1)
    assert abs(measured - order) < 0.2


@pytest.mark.parametrize("name", ["edm", "rectified_flow"])
def test_orders_hold_where_signal_and_noise_powers_do_not_add_up_to_one(name):
    schedule = getattr(schedules, name)()
    for order, history, build in (
        (3, 2, lambda tau: solvers.deis(schedule, tau, 3, lower_order_final=False)),
        (2, 0, lambda tau: solvers.heun(schedule, tau)),
        (2, 0, lambda tau: solvers.pndm(schedule, tau)),
    ):
        measured, _ = observed_order(build, schedule, warped_lambdas, exact_history=history)
        assert abs(measured - order) < 0.2


@warped_too
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_has_its_order_on_any_grid(order, lambdas):
    measured, _ = observed_order(
        lambda tau: solvers.lms(LINEAR, tau, order), LINEAR, lambdas, (80, 160, 320), exact_history=order - 1
    )
    assert abs(measured - order) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_its_order_on_a_grid_uniform_in_rho(order):
    measured, _ = observed_order(
        lambda tau: solvers.ipndm(LINEAR, tau, order), LINEAR, uniform_rhos, (400, 800, 1600), exact_history=order - 1
    )
    assert abs(measured - order) < 0.2


@warped_too
@pytest.mark.parametrize("name", ["ipndm2", "ipndm3", "ipndm4", "plms2", "plms3", "plms4", "pndm", "heun"])
def test_heun_and_the_pndm_family_have_order_two_on_smooth_grids_with_their_own_start(name, lambdas):
    measured, _ = observed_order(lambda tau: ALL[name](LINEAR, tau), LINEAR, lambdas)
    assert abs(measured - 2) < 0.2


# Independent step-by-step implementations


@grids
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("basis", ["lambda", "rho"])
def test_deis_is_the_integral_of_the_polynomial(basis, order, tau):
    """Weights by adaptive quadrature of the Lagrange polynomials in d rho."""
    rho = np.divide(*LINEAR.at(tau)[::-1])
    knots = np.log(rho[:-1]) if basis == "lambda" else rho
    x, past = start_states(LINEAR, tau), []
    for i, (t, s) in enumerate(pairwise(tau)):
        past = [eps_at(x, t), *past][: min(order, tau.size - 1 - i)]
        nodes = [knots[i - k] for k in range(len(past))]
        total = 0
        for k, eps in enumerate(past):

            def polynomial(r, k=k, nodes=nodes):
                v = np.log(r) if basis == "lambda" else r
                return np.prod([(v - m) / (nodes[k] - m) for j, m in enumerate(nodes) if j != k])

            total = total + quad(polynomial, rho[i], rho[i + 1], epsabs=0, epsrel=1e-13)[0] * eps
        x = transfer(x, 0, t, s) + LINEAR.at(s)[0] * total
    table = solvers.deis(LINEAR, tau, order, basis)
    np.testing.assert_allclose(run_table(table, start_states(LINEAR, tau)), x, rtol=1e-11, atol=1e-11)


@grids
def test_deis_in_time_integrates_over_each_interval_of_the_schedule(tau):
    """Order 2: int (t - t_i) / (t_{i-1} - t_i) d rho, whose integrand has kinks at whole times, by parts."""
    table = solvers.deis(LINEAR, tau, 2, "t")
    for i in range(1, tau.size - 2):
        a, n = LINEAR.at(tau)
        whole = np.arange(np.ceil(tau[i + 1]), np.floor(tau[i]) + 1)
        knots = np.unique(np.concatenate([[tau[i + 1]], whole, [tau[i]]]))
        pieces = [quad(lambda t: np.divide(*LINEAR.at(t)[::-1]), *p, epsrel=1e-13)[0] for p in pairwise(knots)]
        rho_end = n[i + 1] / a[i + 1]
        weight = ((tau[i + 1] - tau[i]) * rho_end + sum(pieces)) / (tau[i - 1] - tau[i])
        np.testing.assert_allclose(table.update[i, 0, 1], a[i + 1] * weight, rtol=1e-4)


@grids
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_k_diffusions_sampler(order, tau):
    """In x / a, with coefficients by quadrature and full order to the end (k-diffusion's sample_lms)."""
    a, n = LINEAR.at(tau)
    sigma = n / a
    x, past = start_states(LINEAR, tau) / a[0], []
    for i in range(tau.size - 1):
        past.append((x - mixture_denoiser(a[i] * x, a[i], n[i])) / sigma[i])
        past, current = past[-order:], min(i + 1, order)
        for j in range(current):
            nodes = [sigma[i - k] for k in range(current)]

            def polynomial(s, j=j, nodes=nodes):
                return np.prod([(s - m) / (nodes[j] - m) for k, m in enumerate(nodes) if k != j])

            x = x + quad(polynomial, sigma[i], sigma[i + 1], epsabs=0, epsrel=1e-13)[0] * past[-1 - j]
    table = solvers.lms(LINEAR, tau, order)
    np.testing.assert_allclose(run_table(table, start_states(LINEAR, tau)), x, rtol=1e-11, atol=1e-11)


WEIGHTS = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def mean_eps(past, order=4):
    """Adams-Bashforth on what history there is, the newest last."""
    weights = WEIGHTS[min(len(past), order) - 1]
    return sum(w * e for w, e in zip(weights, past[::-1], strict=False))


@grids
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_adams_bashforth_in_the_ddim_step(order, tau):
    x, past = start_states(LINEAR, tau), []
    for t, s in pairwise(tau):
        past.append(eps_at(x, t))
        x = transfer(x, mean_eps(past, order), t, s)
    got = run_table(solvers.ipndm(LINEAR, tau, order), start_states(LINEAR, tau))
    np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-12)


@grids
def test_plms_is_the_loop_of_diffusers_with_its_doubled_call(tau):
    """PNDMScheduler with skip_prk_steps: the second timestep is visited twice, and not recorded the first time."""
    calls = [tau[0], tau[1], *tau[1:-1]]
    x, kept, past = start_states(LINEAR, tau), None, []
    for counter, t in enumerate(calls):
        eps = eps_at(x, t)
        if counter == 0:
            kept, past = x, [eps]
            x = transfer(x, eps, tau[0], tau[1])
        elif counter == 1:
            x = transfer(kept, (eps + past[-1]) / 2, tau[0], tau[1])
        else:
            past = [*past[-3:], eps]
            x = transfer(x, mean_eps(past), t, tau[counter])
    table = solvers.plms(LINEAR, tau)
    np.testing.assert_array_equal(table.t, calls)
    np.testing.assert_allclose(run_table(table, start_states(LINEAR, tau)), x, rtol=1e-12, atol=1e-12)


@grids
def test_pndm_is_the_papers_runge_kutta_start_and_multistep_rest(tau):
    x, past = start_states(LINEAR, tau), []
    for i, (t, s) in enumerate(pairwise(tau)):
        past.append(eps_at(x, t))
        eps = mean_eps(past)
        if i < 3:
            middle = (t + s) / 2
            e1 = past[-1]
            e2 = eps_at(transfer(x, e1, t, middle), middle)
            e3 = eps_at(transfer(x, e2, t, middle), middle)
            e4 = eps_at(transfer(x, e3, t, s), s)
            eps = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        x = transfer(x, eps, t, s)
    got = run_table(solvers.pndm(LINEAR, tau), start_states(LINEAR, tau))
    np.testing.assert_allclose(got, x, rtol=1e-11, atol=1e-11)


def edm_algorithm_2(schedule, tau, y, z, s_churn, s_min, s_max, s_noise):
    """EDM's Algorithm 2 in y = x / a with given noise; y starts at the first sigma_hat. Returns x_0."""
    sigma = np.divide(*schedule.at(tau)[::-1])
    steps, draws = sigma.size - 1, iter(z)
    for i in range(steps):
        gamma = min(s_churn / steps, np.sqrt(2) - 1) if s_min <= sigma[i] <= s_max else 0
        hat = sigma[i] + gamma * sigma[i]
        if i > 0:
            y = y + np.sqrt(hat**2 - sigma[i] ** 2) * s_noise * next(draws)
        d = (y - mixture_denoiser(y, 1.0, hat)) / hat
        after = y + (sigma[i + 1] - hat) * d
        if sigma[i + 1] != 0:
            d_after = (after - mixture_denoiser(after, 1.0, sigma[i + 1])) / sigma[i + 1]
            after = y + (sigma[i + 1] - hat) * (d + d_after) / 2
        y = after
    return y


@pytest.mark.parametrize("schedule", [LINEAR, schedules.edm()], ids=["linear", "edm"])
@pytest.mark.parametrize(
    "options",
    [(0.0, 0.0, np.inf, 1.0), (3.0, 0.0, np.inf, 1.0), (40.0, 0.05, 3.0, 1.003), (0.5, 0.3, 0.3, 2.0)],
    ids=["none", "some", "capped", "nowhere"],
)
def test_edm_is_algorithm_2(schedule, options):
    tau = timesteps.karras(schedule, 11)[1:]
    table = solvers.edm(schedule, tau, *options)
    x, rng = start_states(schedule, tau), np.random.default_rng(1)
    z = rng.standard_normal((table.nfe, x.size))
    second = z[1::2]  # the noise before step i + 1 comes with the second stage of step i
    wanted = edm_algorithm_2(schedule, tau, x / table.signal[0], second, *options)
    np.testing.assert_allclose(run_table(table, x, z=z), wanted, rtol=1e-10, atol=1e-11)


def test_edm_evaluates_the_network_at_the_raised_noise_level():
    tau = timesteps.karras(LINEAR, 8)[1:]
    table = solvers.edm(LINEAR, tau, s_churn=2.0)
    a, n = LINEAR.at(tau[:-1])
    sigma = n / a * (1 + 2 / 7)
    np.testing.assert_allclose((table.noise / table.signal)[::2], sigma, rtol=1e-10)
    np.testing.assert_allclose(table.t[1::2], tau[1:-1])
    np.testing.assert_array_equal(np.array(LINEAR.at(table.t)), [table.signal, table.noise])
    only = n[3] / a[3]  # both limits belong to the range
    one = solvers.edm(LINEAR, tau, s_churn=2.0, s_min=only, s_max=only).t[::2]
    np.testing.assert_array_equal(np.flatnonzero(one != tau[:-1]), [3])


@grids
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_is_k_diffusions_sampler(eta, tau):
    table = solvers.euler_ancestral(LINEAR, tau, eta)
    x, rng = start_states(LINEAR, tau), np.random.default_rng(2)
    z = rng.standard_normal((table.nfe, x.size))
    a, n = LINEAR.at(tau)
    sigma, y = n / a, x / a[0]
    for i in range(tau.size - 1):
        t, s = sigma[i], sigma[i + 1]
        up = min(s, eta * np.sqrt(s**2 * (t**2 - s**2) / t**2))
        down = np.sqrt(s**2 - up**2)
        y = y + (y - mixture_denoiser(y, 1.0, t)) / t * (down - t) + z[i] * up
    np.testing.assert_allclose(run_table(table, x, z=z), y, rtol=1e-10, atol=1e-10)


def test_consistency_sampling_forgets_all_but_the_estimate():
    tau = timesteps.uniform(LINEAR, 4)
    table = solvers.consistency(LINEAR, tau)
    x, z = start_states(LINEAR, tau), np.random.default_rng(3).standard_normal((4, 11))
    for i in range(4):
        x = mixture_denoiser(x, *LINEAR.at(tau[i]))
        a, n = LINEAR.at(tau[i + 1])
        x = a * x + n * z[i]
    np.testing.assert_allclose(run_table(table, start_states(LINEAR, tau), z=z), x, rtol=1e-14)


# Identities


@pytest.mark.parametrize("schedule", [LINEAR, *SMALL.values()], ids=["linear1000", *SMALL])
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_every_solver_of_order_one_is_ddim(schedule, steps):
    tau = timesteps.uniform(schedule, steps)
    builders = {
        "euler": solvers.euler,
        "2S": lambda s, tau: solvers.dpm_solver_pp_singlestep(s, tau, 1),
    }
    if schedule.at(tau[0])[0] > 0:
        builders |= {
            "deis": lambda s, tau: solvers.deis(s, tau, 1),
            "lms": lambda s, tau: solvers.lms(s, tau, 1),
            "ipndm": lambda s, tau: solvers.ipndm(s, tau, 1),
            "dpm_solver": lambda s, tau: solvers.dpm_solver(s, tau, 1),
        }
    for solver in builders.values():
        table, wanted = solver(schedule, tau), ddim(schedule, tau)
        np.testing.assert_allclose(table.update, wanted.update, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(table.t, wanted.t)


def test_names_of_other_libraries_are_the_tables_of_ddim_and_ddpm():
    tau = timesteps.quadratic(LINEAR, 12)
    for table, same, name in (
        (solvers.euler(LINEAR, tau), ddim(LINEAR, tau), "euler"),
        (solvers.euler_ancestral(LINEAR, tau, 0.3), ddim(LINEAR, tau, 0.3), "euler_ancestral(eta=0.3)"),
        (solvers.sigma_hat(LINEAR, tau), ddpm(LINEAR, tau, variance="large"), "sigma_hat"),
    ):
        np.testing.assert_array_equal(table.update, same.update)
        assert table.name == name


def test_edm_without_churn_is_heun():
    tau = timesteps.karras(LINEAR, 9)
    for options in ({}, {"s_churn": 40, "s_max": 1e-9}):
        table, same = solvers.edm(LINEAR, tau, **options), solvers.heun(LINEAR, tau)
        for field in ("t", "signal", "noise", "update"):
            np.testing.assert_array_equal(getattr(table, field), getattr(same, field))


def test_lms_is_deis_in_rho_but_for_the_orders_at_the_end():
    tau = timesteps.uniform(LINEAR, 9)
    np.testing.assert_array_equal(
        solvers.lms(LINEAR, tau, 3, lower_order_final=True).update, solvers.deis(LINEAR, tau, 3, "rho").update
    )


def test_deis_on_short_even_steps_is_adams_bashforth():
    """As the steps shrink, all bases agree with the classical weights; a cancellation would show here first."""
    tau = np.append(500 + 1e-5 * np.arange(6, 0, -1), 0)
    wanted = solvers.ipndm(LINEAR, tau, 3)
    for basis in ("lambda", "rho", "t"):
        table = solvers.deis(LINEAR, tau, 3, basis)
        np.testing.assert_allclose(table.update[2:4, 0, 1:3], wanted.update[2:4, 0, 1:3], rtol=1e-4)


@pytest.mark.parametrize("name", [k for k in ALL if deterministic(k)])
@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL.keys())
def test_a_constant_estimate_is_reproduced_along_the_whole_way(schedule, name):
    """With D = 0.7 for every x the flow is the ray x = 0.7 a + 1.3 n; each stage's x must lie on it."""
    for steps in (1, 2, 5, 60):
        tau = timesteps.uniform(schedule, steps)
        if schedule.at(tau[0])[0] == 0 and name in EPS_SOLVERS:
            tau = tau[1:] if steps > 1 else np.array([30, 0])
        table = ALL[name](schedule, tau)
        # Tables of small steps have weights near 1 / a at the top of steep schedules.
        scale = 1e-13 * max(1.0, np.abs(table.update).max())
        for stages in range(table.nfe + 1):
            a, n = (table.signal[stages], table.noise[stages]) if stages < table.nfe else (1.0, 0.0)
            start = np.array([0.7 * table.signal[0] + 1.3 * table.noise[0]])
            got = run_table(table, start, lambda x, a, n: 0.7 + 0 * x, stages=stages)
            np.testing.assert_allclose(got, 0.7 * a + 1.3 * n, rtol=0, atol=20 * scale * max(1, n))
            if steps == 60 and 5 < stages < table.nfe - 5:
                break


@pytest.mark.parametrize("name", LOWERED)
def test_the_last_step_returns_the_denoised_estimate(name):
    for steps in (1, 2, 6):
        table = ALL[name](LINEAR, timesteps.uniform(LINEAR, steps))
        wanted = np.zeros(table.num_registers + 2)
        wanted[-2] = 1
        np.testing.assert_array_equal(table.update[-1, 0], wanted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["deis3-lambda", "plms4", "pndm", "heun", "dpm_solver3", "3s"])
def test_the_scan_runs_these_tables_as_plain_numpy_does(name):
    tau = timesteps.uniform(LINEAR, 6)
    table, x = ALL[name](LINEAR, tau), start_states(LINEAR, tau)
    network = ideal_network(LINEAR, lambda x, a, n: mixture_denoiser(x, a, n, jnp))
    key = jax.random.key(0)
    got = diffusion.sample(network, {}, table, key, x.size, (1,), prediction="x0", x_init=x[:, None])
    np.testing.assert_allclose(got[:, 0], run_table(table, x), rtol=1e-9, atol=1e-9)


# Costs, shapes and finiteness


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
def test_the_number_of_network_calls_is_that_of_the_paper(steps):
    tau = timesteps.uniform(LINEAR, steps)
    for solver in (solvers.deis, solvers.lms, solvers.ipndm):
        assert solver(LINEAR, tau).nfe == steps
    assert solvers.plms(LINEAR, tau).nfe == steps + (steps > 1)
    assert solvers.pndm(LINEAR, tau).nfe == (steps + 9 if steps >= 4 else 4 * steps - 3)
    assert solvers.heun(LINEAR, tau).nfe == 2 * steps - 1


def test_tables_hold_no_more_registers_than_their_order_needs():
    tau = timesteps.uniform(LINEAR, 20)
    for order in (1, 2, 3, 4):
        for solver in (solvers.deis, solvers.lms, solvers.ipndm):
            assert solver(LINEAR, tau, order).num_registers == order
    assert solvers.plms(LINEAR, tau).num_registers == 4
    assert solvers.pndm(LINEAR, tau).num_registers == 6
    assert solvers.heun(LINEAR, tau).num_registers == 2


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL.keys())
def test_every_entry_is_finite_on_every_grid_or_the_start_at_zero_signal_is_refused(schedule, name):
    terminal = schedule.alpha_bar[-1] == 0
    for grid, build in timesteps.GRIDS.items():
        if terminal and grid in ("log_snr", "karras", "polyexponential", "kl_optimal"):
            continue
        for steps in (1, 2, 60):
            tau = build(schedule, steps)
            if schedule.at(tau[0])[0] == 0 and name in EPS_SOLVERS:
                with refused("zero.*ddim"):
                    ALL[name](schedule, tau)
                continue
            table = ALL[name](schedule, tau)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(table))
            np.testing.assert_array_equal(table.tau, tau)
            assert np.all(table.t > 0)


@pytest.mark.parametrize("name", list(ALL))
def test_every_entry_is_finite_at_all_thousand_timesteps(name):
    table = ALL[name](LINEAR, timesteps.uniform(LINEAR, 1000))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(table))


# Analytic-DPM


def gaussian_gamma(schedule, tau, variance):
    """E |eps_hat|^2 / d of the ideal network on N(mean, variance): eps_hat = n (x - a mean) / v, Var x = v."""
    signal_power, noise_power = schedule.powers(tau[:-1])
    return noise_power / (signal_power * variance + noise_power)


@pytest.mark.parametrize("variance", [0.04, 0.5, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, SMALL["edm"]], ids=["linear", "edm"])
def test_analytic_variance_is_exact_on_gaussian_data_at_every_step(schedule, eta, variance):
    """From the true marginal at tau[0]; the last step returns D, and so lacks exactly Cov(x_0 | x)."""
    for steps in (1, 2, 5, 10, 100 if schedule is LINEAR else 60):
        tau = timesteps.uniform(schedule, steps)
        signal_power, noise_power = schedule.powers(tau)
        marginal = signal_power * variance + noise_power
        table = solvers.analytic_dpm(schedule, tau, gaussian_gamma(schedule, tau, variance), eta)
        start = (0.3 * np.sqrt(signal_power[0]), marginal[0])
        for done in {1, steps // 2, steps - 1, steps} - {0}:
            parts = {k: getattr(table, k)[:done] for k in ("t", "signal", "noise", "update")}
            moments = gaussian_moments(dataclasses.replace(table, **parts), 0.3, variance, start)
            lacking = noise_power[-2] / marginal[-2] * variance if done == steps else 0.0
            wanted = (0.3 * np.sqrt(signal_power[done]), marginal[done] - lacking)
            np.testing.assert_allclose(moments, wanted, rtol=1e-10)


def test_analytic_variance_of_a_point_mass_is_that_of_ddim():
    """gamma = 1: eps_hat is all noise, nothing of x_0 is unknown."""
    tau = timesteps.uniform(LINEAR, 10)
    for eta in (0.0, 1.0):
        np.testing.assert_array_equal(
            solvers.analytic_dpm(LINEAR, tau, np.ones(10), eta).update, ddim(LINEAR, tau, eta).update
        )


def test_analytic_covariance_is_limited_only_on_request():
    tau = timesteps.uniform(LINEAR, 4)
    gamma = np.array([1.01, 0.2, 0.2, 0.2])
    with refused("gamma is 1.01.*0..1.*max_cov"):
        solvers.analytic_dpm(LINEAR, tau, gamma)
    limited = solvers.analytic_dpm(LINEAR, tau, gamma, max_cov=1.0).update[:, 0]
    at_bounds = ddim(LINEAR, tau, 1.0).update[:, 0]
    np.testing.assert_allclose(limited[0], at_bounds[0])
    np.testing.assert_allclose(limited[1, 2] ** 2, at_bounds[1, 2] ** 2 + at_bounds[1, 1] ** 2)
    assert limited[-1, 2] == 0


# Refusals


def test_wrong_options_are_refused_in_one_line():
    tau = timesteps.uniform(LINEAR, 5)
    for call, pattern in (
        (lambda: solvers.deis(LINEAR, tau, 7), "order is 7.*1..4"),
        (lambda: solvers.deis(LINEAR, tau, 0), "order is 0.*1..4"),
        (lambda: solvers.deis(LINEAR, tau, 2.5), "order is 2.5.*1..4"),
        (lambda: solvers.deis(LINEAR, tau, 2, "sigma"), "'sigma'.*lambda, rho, t"),
        (lambda: solvers.lms(LINEAR, tau, 5), "order is 5.*1..4"),
        (lambda: solvers.ipndm(LINEAR, tau, -1), "order is -1.*1..4"),
        (lambda: solvers.plms(LINEAR, tau, 1), "order is 1.*2..4"),
        (lambda: solvers.edm(LINEAR, tau, s_churn=-1), "s_churn is -1.*at least 0"),
        (lambda: solvers.edm(LINEAR, tau, s_churn=np.nan), "s_churn is nan"),
        (lambda: solvers.edm(LINEAR, tau, s_min=2, s_max=1), "s_min is 2 and s_max 1"),
        (lambda: solvers.edm(LINEAR, tau, s_noise=0), "s_noise is 0.*above 0"),
        (lambda: solvers.edm(LINEAR, tau, s_churn=1), "t = 1000, above the schedule's largest.*s_max below.*start"),
        (lambda: solvers.euler_ancestral(LINEAR, tau, 1.5), "eta is 1.5.*0..1"),
        (lambda: solvers.analytic_dpm(LINEAR, tau, np.ones(4)), r"gamma has shape \(4,\).*\(5,\)"),
        (lambda: solvers.analytic_dpm(LINEAR, tau, np.full(5, -0.1)), "gamma is -0.1.*0..1"),
        (lambda: solvers.analytic_dpm(LINEAR, tau, np.full(5, np.nan)), "gamma is nan"),
        (lambda: solvers.analytic_dpm(LINEAR, tau, np.ones(5), max_cov=0), "max_cov is 0"),
        (lambda: solvers.analytic_dpm(SMALL["zero_snr"], [60, 0], [1.0]), "signal is zero"),
    ):
        with refused(pattern):
            call()


@pytest.mark.parametrize("name", list(ALL))
def test_a_tau_that_is_no_grid_is_refused(name):
    for tau in ([0], [500, 1], [3, 5, 0], [1001, 0], [np.nan, 0]):
        with refused("tau"):
            ALL[name](LINEAR, tau)
