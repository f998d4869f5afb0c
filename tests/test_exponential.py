"""Laws of DPM-Solver++ and UniPC: measured orders, identities, the published algorithms written out step by step."""

import dataclasses
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gaussian_denoiser, ideal_network, mixture_denoiser, refused
from scipy.integrate import quad, solve_ivp

import diffusion
from diffusion import schedules, timesteps
from diffusion.solvers import ddim, dpm_solver_pp, gaussian_moments, unipc
from diffusion.solvers.integrals import exponential_moments, lagrange_integrals

T = 1000
LINEAR = schedules.linear()
SCHEDULES = {"linear": LINEAR, "scaled_linear": schedules.scaled_linear(), "cosine": schedules.cosine()}
ZERO_SNR = schedules.zero_terminal_snr(schedules.scaled_linear())
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
START = np.linspace(-2.0, 2.0, 9)

ALL = {
    **{f"dpm{p}-{v}": (dpm_solver_pp, {"order": p, "variant": v}) for p in (1, 2, 3) for v in ("exact", "official")},
    **{
        f"sde{p}-{v}": (dpm_solver_pp, {"order": p, "variant": v, "sde_eta": 0.7})
        for p, v in ((2, "official"), (3, "exact"))
    },
    **{f"unipc{p}-{v}": (unipc, {"order": p, "variant": v}) for p in (1, 2, 3, 4) for v in ("exact", "bh1", "bh2")},
}
every_sampler = pytest.mark.parametrize(("solver", "options"), ALL.values(), ids=ALL.keys())
deterministic = pytest.mark.parametrize(
    ("solver", "options"), [v for k, v in ALL.items() if "sde" not in k], ids=[k for k in ALL if "sde" not in k]
)


def run(table, x, denoiser=mixture_denoiser, noise=None, exact_start=()):
    """What the network sees in each stage, and the sample last; exact_start replaces the first of these."""
    registers = np.zeros((table.num_registers, x.size))
    registers[0], path = x, []
    noise = np.zeros((table.nfe, x.size)) if noise is None else noise
    for i, row in enumerate(table.update):
        if i < len(exact_start):
            registers[0] = exact_start[i]
        path.append(registers[0])
        denoised = denoiser(registers[0], table.signal[i], table.noise[i])
        registers = row @ np.stack([*registers, denoised, noise[i]])
    return [*path, registers[0]]


def levels(half_log_snr):
    """Signal and noise of a schedule with a^2 + n^2 = 1."""
    return 1 / np.sqrt(1 + np.exp(-2 * half_log_snr)), 1 / np.sqrt(1 + np.exp(2 * half_log_snr))


def flow(x, start, end):
    """The probability flow of the mixture from one lambda to another: y = x / a obeys dy / dlambda = D - y."""

    def slope(lam, y):
        a, n = levels(lam)
        return mixture_denoiser(a * y, a, n) - y

    y = solve_ivp(slope, (start, end), x / levels(start)[0], method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    return levels(end)[0] * y


def grid_at(half_log_snr, schedule=LINEAR):
    """The grid through given values of lambda, then 0."""
    return np.append(schedule.time_of(half_log_snr), 0.0)


def uniform_lambda(steps, start, end):
    return np.linspace(start, end, steps + 1)


def rough_lambda(steps, start, end):
    """Steps that go as 1, 2, 1, 2, ... on top of a smooth warp; their ratios do not tend to 1."""
    ends = np.append(0, np.cumsum(np.tile([1.0, 2.0], steps // 2))) / (1.5 * steps)
    return start + (end - start) * np.expm1(1.2 * ends) / np.expm1(1.2)


MEASURED = {
    "ddim": (dpm_solver_pp, {"order": 1}, 1),
    "2m-exact": (dpm_solver_pp, {"order": 2}, 2),
    "2m-official": (dpm_solver_pp, {"order": 2, "variant": "official"}, 2),
    "3m-exact": (dpm_solver_pp, {"order": 3}, 3),
    "3m-official": (dpm_solver_pp, {"order": 3, "variant": "official"}, 2),
    **{f"unipc{p}-{v}": (unipc, {"order": p, "variant": v}, p + 1) for p in (1, 2, 3) for v in ("exact", "bh1", "bh2")},
    "unipc4-exact": (unipc, {"order": 4, "variant": "exact"}, 5),
    **{f"unip{p}": (unipc, {"order": p, "variant": "exact", "corrector": False}, p) for p in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("spacing", [uniform_lambda, rough_lambda])
@pytest.mark.parametrize(("solver", "options", "wanted"), MEASURED.values(), ids=MEASURED.keys())
def test_the_observed_order_is_the_stated_one(solver, options, wanted, spacing):
    """On the mixture between two interior values of lambda, from exact start values.

    The first order - 1 stages see the exact trajectory, and no corrector touches them, so that all estimates the full
    order begins with are exact. The error is taken where the network sees lambda = end, before the last step to 0.
    """
    start, end = -1.5, 0.5
    truth, errors, numbers = flow(START, start, end), [], np.array([48, 96, 192, 384])
    for number in numbers:
        lam, options_now = spacing(number, start, end), dict(options)
        warm_up = options["order"] - 1
        if solver is unipc:
            plain = not options_now.pop("corrector", True)
            options_now["disable_corrector"] = range(number + 1 if plain else warm_up)
        exact_start = [flow(START, start, lam[i]) if i else START for i in range(warm_up + 1)]
        table = solver(LINEAR, grid_at(lam), lower_order_final=False, **options_now)
        errors.append(np.sqrt(np.mean((run(table, START, exact_start=exact_start)[-2] - truth) ** 2)))
    order = -np.polyfit(np.log(numbers[-3:]), np.log(errors[-3:]), 1)[0]
    assert abs(order - wanted) < 0.2, (order, errors)


def test_a_ddim_start_caps_third_order_at_two():
    """Why the orders above need exact start values; without them the first step, of order 1, decides."""
    truth, errors, numbers = flow(START, -1.5, 0.5), [], np.array([96, 192, 384])
    for number in numbers:
        table = dpm_solver_pp(LINEAR, grid_at(uniform_lambda(number, -1.5, 0.5)), order=3)
        errors.append(np.sqrt(np.mean((run(table, START)[-2] - truth) ** 2)))
    assert abs(-np.polyfit(np.log(numbers), np.log(errors), 1)[0] - 2) < 0.2


def polynomial(degree):
    """A denoiser whose estimate is lambda^degree whatever x is."""
    return lambda x, a, n: np.full_like(x, np.log(a / n) ** degree)


@pytest.mark.parametrize("sde_eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_adams_bashforth_integrates_polynomials_of_degree_p_minus_1(order, sde_eta):
    """D a polynomial in lambda, on uneven steps: what is left is the integral, here by adaptive quadrature."""
    lam = np.array([-1.2, -0.9, -0.1, 0.05, 0.8])
    for degree in range(order):
        table = dpm_solver_pp(LINEAR, grid_at(lam), order, sde_eta, lower_order_final=False)
        path = run(table, START, polynomial(degree))
        for i in range(order - 1, lam.size - 1):
            (_, n), (a_s, n_s) = levels(lam[i]), levels(lam[i + 1])
            rate, h = 1 + sde_eta, lam[i + 1] - lam[i]
            integral = quad(
                lambda v, d=degree, r=rate, e=lam[i + 1]: r * np.exp(-r * (e - v)) * v**d, lam[i], lam[i + 1]
            )
            wanted = n_s / n * np.exp(-sde_eta * h) * path[i] + a_s * integral[0]
            np.testing.assert_allclose(path[i + 1], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_unipc_corrects_to_polynomials_of_degree_p(order):
    """One degree more than it predicts. A corrected x is seen through the first-order step that starts from it."""
    lam = np.array([-1.2, -0.9, -0.1, 0.05, 0.8, 1.0, 1.3])
    orders = [*(min(order, i + 1) for i in range(lam.size - 2)), 1, 1]
    table = unipc(LINEAR, grid_at(lam), orders, "exact", disable_corrector=range(order - 1))
    (_, n), (a_s, n_s), h = levels(lam[-2]), levels(lam[-1]), lam[-1] - lam[-2]
    for degree in range(order + 1):

        def exact(end, degree=degree):
            integral = quad(lambda v: np.exp(v - end) * v**degree, lam[0], end, epsabs=1e-14)[0]
            return levels(end)[1] / levels(lam[0])[1] * START + levels(end)[0] * integral

        got = run(table, START, polynomial(degree), exact_start=[exact(end) for end in lam[:order]])[-2]
        wanted = n_s / n * exact(lam[-2]) - a_s * np.expm1(-h) * lam[-2] ** degree
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


@every_sampler
@every_schedule
def test_a_constant_estimate_is_integrated_exactly(schedule, solver, options):
    """x_t = a_t c + n_t eps goes to a_s c + n_s eps; with noise, to the same mean and the forward variance."""
    tau = timesteps.uniform(schedule, 12)
    table = solver(schedule, tau, **options)
    a, n = schedule.at(tau)
    path = np.array(run(table, a[0] * 0.4 + n[0] * START, lambda x, a, n: np.full_like(x, 0.4)))
    g = options.get("sde_eta", 0.0)
    with np.errstate(divide="ignore"):
        shrink = np.exp(-g * (np.log(a / n) - np.log(a[0] / n[0]))) if g else np.ones_like(a)
    wanted = 0.4 * a[:, None] + (n * shrink)[:, None] * START
    np.testing.assert_allclose(path, wanted, rtol=1e-11, atol=1e-12)
    assert gaussian_moments(table, 0.4, 0.0) == pytest.approx((0.4, 0.0), abs=1e-12)


@pytest.mark.parametrize("sde_eta", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["exact", "official"])
def test_weights_sum_to_one_minus_the_decay(order, variant, sde_eta):
    tau = timesteps.log_snr(LINEAR, 20)
    update = dpm_solver_pp(LINEAR, tau, order, sde_eta, variant).update
    a, _ = LINEAR.at(tau)
    sums = update[:, 0, 1:-1].sum(axis=1) / a[1:]
    wanted = -np.expm1(-(1 + sde_eta) * np.diff(LINEAR.half_log_snr(tau)))
    np.testing.assert_allclose(sums, wanted, rtol=1e-11)


@pytest.mark.parametrize("z", [1e-9, 1e-6, 1e-3, 0.1, 1.0, 3.999, 4.0, 9.0, 80.0, np.inf])
def test_moments_agree_with_60_digit_arithmetic(z):
    wanted = []
    with localcontext() as context:
        context.prec = 120
        exact = Decimal(float(z)) if np.isfinite(z) else Decimal(10) ** 40
        for j in range(6):
            wanted.append(1 - (-exact).exp() if j == 0 else 1 - j / exact * wanted[-1])
    np.testing.assert_allclose(exponential_moments(z, 6), [float(w) for w in wanted], rtol=4e-15)


@pytest.mark.parametrize("z", [1e-3, 0.2, 6.0])
@pytest.mark.parametrize("nodes", [[0, -1], [0, -300.0, -301], [0, -0.02, -5], [0, -1, -1.5, 1], [0, -2, -2.2, -9, 1]])
def test_weights_are_the_integrals_of_the_lagrange_polynomials(nodes, z):
    nodes = np.array(nodes, float)
    got = lagrange_integrals(nodes, exponential_moments(z, nodes.size))
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)

        def kernel(v, node=node, others=others):
            return z * np.exp(-z * (1 - v)) * np.prod((v - others) / (node - others))

        wanted = quad(kernel, 0, 1, epsabs=0, epsrel=1e-13)[0]
        np.testing.assert_allclose(got[k], wanted, rtol=2e-12)


@pytest.mark.parametrize("grid", ["uniform", "karras", "log_snr"])
@every_schedule
def test_order_one_is_ddim(schedule, grid):
    for steps in (1, 2, 25, 400):
        tau = timesteps.GRIDS[grid](schedule, steps)
        for variant in ("exact", "official"):
            for eta in (0.0, 1.0):
                table = dpm_solver_pp(schedule, tau, 1, eta, variant)
                np.testing.assert_allclose(table.update, ddim(schedule, tau, eta).update, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_order_one_is_ddim_from_zero_signal_too(steps, eta):
    tau = timesteps.uniform(ZERO_SNR, steps)
    got, wanted = dpm_solver_pp(ZERO_SNR, tau, 1, eta), ddim(ZERO_SNR, tau, eta)
    np.testing.assert_allclose(got.update, wanted.update, rtol=0, atol=1e-12)


@every_schedule
def test_unip_alone_is_exponential_adams_bashforth(schedule):
    for order in (1, 2, 3):
        for steps in (1, 2, 10):
            tau = timesteps.uniform(schedule, steps)
            predictor = unipc(schedule, tau, order, "exact", disable_corrector=range(steps))
            np.testing.assert_array_equal(predictor.update, dpm_solver_pp(schedule, tau, order).update)


def test_unip_2_with_bh2_is_the_published_midpoint_method():
    tau = timesteps.uniform(LINEAR, 10)
    predictor = unipc(LINEAR, tau, 2, "bh2", disable_corrector=range(10))
    np.testing.assert_array_equal(predictor.update, dpm_solver_pp(LINEAR, tau, 2, variant="official").update)


def published_dpm(schedule, tau, order, x, g=0.0, noise=None, solver_type="midpoint"):
    """DPM-Solver++ 2M (Algorithm 2) and 3M, step by step in the notation of the authors' code; SDE for g > 0."""
    (a, n), lam = schedule.at(tau), schedule.half_log_snr(tau)
    steps, outputs = tau.size - 1, []
    for i in range(steps):
        outputs.append(mixture_denoiser(x, a[i], n[i]))
        now, h = min(order, i + 1, steps - i), lam[i + 1] - lam[i]
        m0, h_eta = outputs[-1], (1 + g) * h
        x_next = n[i + 1] / n[i] * np.exp(-g * h if g else 0.0) * x - a[i + 1] * np.expm1(-h_eta) * m0
        if now == 2:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (m0 - outputs[-2]) / r0
            phi = -0.5 * np.expm1(-h_eta) if solver_type == "midpoint" else np.expm1(-h_eta) / h_eta + 1
            x_next = x_next + a[i + 1] * phi * d1
        if now == 3:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d1_0, d1_1 = (m0 - outputs[-2]) / r0, (outputs[-2] - outputs[-3]) / r1
            d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x_next = x_next + a[i + 1] * (np.expm1(-h_eta) / h_eta + 1) * d1
            x_next = x_next - a[i + 1] * ((np.expm1(-h_eta) + h_eta) / h_eta**2 - 0.5) * d2
        x = x_next
        if g:
            x = x + n[i + 1] * np.sqrt(-np.expm1(-2 * g * h)) * noise[i]
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30])
@pytest.mark.parametrize("sde_eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
@every_schedule
def test_official_variants_are_the_published_algorithms(schedule, order, sde_eta, steps):
    tau = timesteps.uniform(schedule, steps)
    noise = np.random.default_rng(0).standard_normal((steps, START.size))
    got = run(dpm_solver_pp(schedule, tau, order, sde_eta, "official"), START, noise=noise)[-1]
    np.testing.assert_allclose(got, published_dpm(schedule, tau, order, START, sde_eta, noise), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sde_eta", [0.0, 1.0])
def test_exact_2m_is_the_heun_type_of_diffusers(sde_eta):
    tau = timesteps.log_snr(LINEAR, 12)
    noise = np.random.default_rng(0).standard_normal((12, START.size))
    got = run(dpm_solver_pp(LINEAR, tau, 2, sde_eta), START, noise=noise)[-1]
    np.testing.assert_allclose(got, published_dpm(LINEAR, tau, 2, START, sde_eta, noise, "heun"), rtol=0, atol=1e-12)


def published_unipc(schedule, tau, order, variant, x, lower_order_final=True):
    """UniPC's multistep B(h) update for x_0 prediction, as the authors' loop: predict, evaluate, correct."""
    (a, n), lam = schedule.at(tau), schedule.half_log_snr(tau)
    steps, outputs = tau.size - 1, [mixture_denoiser(x, a[0], n[0])]
    for step in range(1, steps + 1):
        now = min(order, step, steps + 1 - step if lower_order_final or step == steps else order)
        h = lam[step] - lam[step - 1]
        rks = [(lam[step - 1 - k] - lam[step - 1]) / h for k in range(1, now)]
        d1s = [(outputs[-1 - k] - outputs[-1]) / rk for k, rk in zip(range(1, now), rks, strict=True)]
        x_linear = n[step] / n[step - 1] * x - a[step] * np.expm1(-h) * outputs[-1]
        if step == steps:
            return x_linear  # to lambda = inf, order 1 and not corrected
        scale = -h if variant == "bh1" else np.expm1(-h)
        matrix, right, phi, factorial = [], [], np.expm1(-h) / -h - 1, 1
        for k in range(1, now + 1):
            matrix.append(np.array([*rks, 1.0]) ** (k - 1))
            right.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        matrix, right = np.array(matrix), np.array(right)
        rhos_p = np.array([0.5]) if now == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
        rhos_c = np.array([0.5]) if now == 1 else np.linalg.solve(matrix, right)
        predicted = x_linear - a[step] * scale * sum(r * d for r, d in zip(rhos_p, d1s, strict=True))
        outputs.append(mixture_denoiser(predicted, a[step], n[step]))
        residual = sum(r * d for r, d in zip(rhos_c[:-1], d1s, strict=True))
        x = x_linear - a[step] * scale * (residual + rhos_c[-1] * (outputs[-1] - outputs[-2]))
    raise AssertionError


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", [True, False])
@every_schedule
def test_unipc_is_the_published_algorithm(schedule, order, variant, steps, final):
    tau = timesteps.uniform(schedule, steps)
    got = run(unipc(schedule, tau, order, variant, final), START)[-1]
    np.testing.assert_allclose(got, published_unipc(schedule, tau, order, variant, START, final), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", timesteps.GRIDS)
@every_schedule
def test_every_entry_is_finite_and_the_end_returns_the_estimate(schedule, grid):
    for steps in (1, 2, 5):
        tau = timesteps.GRIDS[grid](schedule, steps)
        for solver, options in ALL.values():
            for final in (True, False):
                table = solver(schedule, tau, lower_order_final=final, **options)
                assert_usable(table, tau)


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "karras", "log_snr"])
@pytest.mark.parametrize("name", ["dpm3-official", "sde3-exact", "unipc3-bh2"])
@every_schedule
def test_every_entry_is_finite_at_all_timesteps(schedule, grid, name):
    solver, options = ALL[name]
    tau = timesteps.GRIDS[grid](schedule, T)
    assert_usable(solver(schedule, tau, **options), tau)


def assert_usable(table, tau):
    assert all(np.all(np.isfinite(leaf)) and leaf.dtype == np.float64 for leaf in jax.tree.leaves(table))
    assert table.nfe == tau.size - 1
    np.testing.assert_array_equal(table.t, tau[:-1])
    np.testing.assert_allclose(table.update[-1, 0], np.eye(table.num_registers + 2)[-2], rtol=0, atol=1e-15)


@every_sampler
def test_zero_signal_takes_one_first_order_step_and_begins_again_below(solver, options):
    """Nothing later may use the estimate at lambda = -inf; the rest is the same sampler started lower."""
    for steps in (1, 2, 3, 10):
        tau = timesteps.uniform(ZERO_SNR, steps)
        table = solver(ZERO_SNR, tau, **options)
        assert_usable(table, tau)
        if steps > 1:
            rest = solver(ZERO_SNR, tau[1:], **options)
            noise = np.random.default_rng(0).standard_normal((steps, START.size))
            path = run(table, START, noise=noise)
            np.testing.assert_allclose(path[1:], run(rest, path[1], noise=noise[1:]), rtol=0, atol=1e-13)
            assert table.update[0, 0, -2] == pytest.approx(ZERO_SNR.at(tau[1])[0])


def test_registers_are_as_few_as_the_orders_used_need():
    for order in (1, 2, 3):
        assert dpm_solver_pp(LINEAR, timesteps.uniform(LINEAR, 10), order).num_registers == order
        assert unipc(LINEAR, timesteps.uniform(LINEAR, 10), order).num_registers == order + 1
    for solver in (dpm_solver_pp, unipc):
        assert solver(LINEAR, timesteps.uniform(LINEAR, 1), 3).num_registers == 1


def test_an_order_for_each_step_overrides_warm_up_and_end():
    tau = timesteps.uniform(LINEAR, 6)
    for solver in (dpm_solver_pp, unipc):
        np.testing.assert_array_equal(solver(LINEAR, tau, (1, 2, 3, 3, 2, 1)).update, solver(LINEAR, tau, 3).update)
        to_the_end = solver(LINEAR, tau, 3, lower_order_final=False)
        np.testing.assert_array_equal(solver(LINEAR, tau, [1, 2, 3, 3, 3, 1]).update, to_the_end.update)
    assert "order=123321" in unipc(LINEAR, tau, (1, 2, 3, 3, 2, 1)).name


def test_names_tell_the_options():
    tau = timesteps.uniform(LINEAR, 6)
    assert dpm_solver_pp(LINEAR, tau).name == "dpm_solver_pp(order=2, sde_eta=0, variant=exact)"
    assert unipc(LINEAR, tau, variant="bh1").name == "unipc(order=3, variant=bh1)"


def test_signal_and_noise_need_not_be_on_the_unit_circle():
    """Only lambda matters: where D is a function of x / a, samples at the same lambdas are the same."""
    noise = np.array([60.0, 30.0, 11.0, 4.0, 1.0, 0.3])
    growing = schedules.from_signal_noise(np.ones(81), np.arange(81.0))  # a = 1 and n = t
    schedule = schedules.linear(beta_end=0.03)
    for solver in (dpm_solver_pp, unipc):
        exploding = solver(growing, np.append(noise, 0.0), 3)
        circle = solver(schedule, grid_at(-np.log(noise), schedule), 3)
        wanted = run(exploding, 60.0 * START)[-1]
        start = circle.signal[0] * 60.0 * START
        got = run(circle, start, lambda x, a, n: mixture_denoiser(x / a, 1.0, n / a))[-1]
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["exact", "official"])
@pytest.mark.parametrize("variance", [0.25, 1.5])
def test_the_variance_error_of_2m_on_gaussian_data_falls_as_the_square(variance, variant):
    """Before the last step, whose error does not fall with S; the flow scales x by the ratio of marginal stds."""
    steps, errors = np.array([50, 100, 200, 400]), []
    for number in steps:
        table = dpm_solver_pp(LINEAR, timesteps.log_snr(LINEAR, number), 2, variant=variant)
        a, n = table.signal[[0, -1]], table.noise[[0, -1]]
        start, end = a**2 * variance + n**2
        parts = {field: getattr(table, field)[:-1] for field in ("t", "signal", "noise", "update")}
        errors.append(abs(gaussian_moments(dataclasses.replace(table, **parts), 0.3, variance)[1] - end / start))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - 2) < 0.2


def test_reverse_sde_on_gaussian_data_tends_to_the_true_variance():
    """SDE-DPM-Solver++ 2M, whose first-order twin is ancestral sampling: better than it at equal steps."""
    for variant in ("exact", "official"):
        errors = {}
        for order in (1, 2):
            tables = [dpm_solver_pp(LINEAR, timesteps.log_snr(LINEAR, s), order, 1.0, variant) for s in (25, 50, 100)]
            errors[order] = np.abs([gaussian_moments(table, 0.3, 0.5)[1] - 0.5 for table in tables])
        assert np.all(np.diff(errors[2]) < 0)
        assert np.all(errors[2] < errors[1] / 2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["dpm3-official", "unipc3-bh2"])
def test_the_scan_does_what_the_table_says(name):
    solver, options = ALL[name]
    table = solver(LINEAR, timesteps.uniform(LINEAR, 10), **options)
    network = ideal_network(LINEAR, lambda x, a, n: mixture_denoiser(x, a, n, jnp))
    got = diffusion.sample(
        network, {}, table, jax.random.key(0), START.size, (1,), prediction="x0", x_init=START[:, None]
    )
    np.testing.assert_allclose(got[:, 0], run(table, START)[-1], rtol=0, atol=1e-11)


def test_the_affine_denoiser_of_gaussian_data_gives_the_moments_of_the_path():
    """Guards the runner: at the mean of the data's marginals the path stays there."""
    table = unipc(LINEAR, timesteps.uniform(LINEAR, 8), 3)
    x = table.signal[:1] * 0.3
    path = run(table, x, lambda x, a, n: gaussian_denoiser(x, a, n, 0.3, 0.5))
    np.testing.assert_allclose(np.ravel(path[:-1]), 0.3 * table.signal, atol=1e-12)


TAU = [900, 500, 100, 0]


@pytest.mark.parametrize(
    ("build", "pattern"),
    [
        (lambda: dpm_solver_pp(LINEAR, TAU, 7), r"order is 7.*1\.\.3"),
        (lambda: dpm_solver_pp(LINEAR, TAU, 0), r"order is 0.*1\.\.3"),
        (lambda: dpm_solver_pp(LINEAR, TAU, 2.5), r"order is 2\.5.*whole"),
        (lambda: dpm_solver_pp(LINEAR, TAU, None), "order is None"),
        (lambda: unipc(LINEAR, TAU, 5), r"order is 5.*1\.\.4"),
        (lambda: unipc(LINEAR, TAU, (1, 2)), "names 2 steps and tau has 3"),
        (lambda: unipc(LINEAR, TAU, (1, 3, 1)), r"order of step 1 is 3.*1\.\.2"),
        (lambda: unipc(LINEAR, TAU, (1, 2, 2)), r"order of step 2 is 2.*1\.\.1"),
        (lambda: unipc(ZERO_SNR, [1000, 500, 100, 0], (1, 2, 1)), r"order of step 1 is 2.*1\.\.1"),
        (lambda: dpm_solver_pp(LINEAR, TAU, sde_eta=-0.1), r"sde_eta is -0\.1.*at least 0"),
        (lambda: dpm_solver_pp(LINEAR, TAU, sde_eta=np.nan), "sde_eta is nan"),
        (lambda: dpm_solver_pp(LINEAR, TAU, sde_eta=np.inf), "sde_eta is inf"),
        (lambda: dpm_solver_pp(LINEAR, TAU, variant="oficial"), "'oficial'.*did you mean 'official'"),
        (lambda: unipc(LINEAR, TAU, variant="bh3"), "'bh3'.*bh1, bh2, exact"),
        (lambda: unipc(LINEAR, TAU, disable_corrector=[3]), r"step 3.*0\.\.2"),
        (lambda: unipc(LINEAR, TAU, disable_corrector=[-1]), r"step -1.*0\.\.2"),
        (lambda: dpm_solver_pp(LINEAR, [500, 500, 0]), "not strictly descending"),
        (lambda: unipc(LINEAR, [1200, 0]), r"1\.\.1000"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(build, pattern):
    with refused(pattern):
        build()
