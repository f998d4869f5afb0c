"""Laws of the DDIM and DDPM tables, and of the exact propagation of Gaussian data through any table."""

import dataclasses
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    MEANS,
    VARIANCES,
    WEIGHTS,
    exact_powers,
    gaussian_denoiser,
    ideal_network,
    mixture_denoiser,
    refused,
)
from scipy.integrate import solve_ivp

import diffusion
from diffusion import gaussian, schedules, timesteps
from diffusion.solvers import SOLVERS, SamplerTable, ddim, ddpm, gaussian_moments, make_table

T = 1000
LINEAR = schedules.linear()
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear()),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
whole_grids = pytest.mark.parametrize("grid", ["uniform", "quadratic", "leading", "linspace"])
STEPS = (1, 2, 3, 10, 25, 100, T)


def columns(table):
    """keep, add and sigma of a table with one register."""
    assert table.num_registers == 1
    return table.update[:, 0, 0], table.update[:, 0, 1], table.update[:, 0, 2]


@pytest.mark.usefixtures("float64")
@whole_grids
@every_schedule
def test_eta_one_is_the_respaced_posterior(schedule, grid):
    for steps in STEPS:
        tau = timesteps.GRIDS[grid](schedule, steps)
        keep, add, sigma = columns(ddim(schedule, tau, eta=1.0))
        zeros, ones = np.zeros(tau.size - 1), np.ones(tau.size - 1)
        from_xt, variance = gaussian.posterior(schedule, ones, zeros, tau[:-1], tau[1:])
        from_x0, _ = gaussian.posterior(schedule, zeros, ones, tau[:-1], tau[1:])
        assert variance.dtype == np.float64
        np.testing.assert_allclose(keep, from_xt, rtol=0, atol=1e-12)
        np.testing.assert_allclose(add, from_x0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(sigma**2, variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", ["uniform", "log_snr", "karras"])
def test_ddim_is_equation_12_on_whole_and_real_grids(grid, eta):
    """x_s = a_s x_0 + sqrt(n_s^2 - sigma^2) eps + sigma z, evaluated on random x_0 and eps."""
    for steps in STEPS[:-1]:
        tau = timesteps.GRIDS[grid](LINEAR, steps)
        (a, n), rng = LINEAR.at(tau), np.random.default_rng(0)
        sigma = eta * n[1:] / n[:-1] * np.sqrt(np.maximum(1 - a[:-1] ** 2 / a[1:] ** 2, 0))
        x0, eps, z = rng.standard_normal((3, steps))
        wanted = a[1:] * x0 + np.sqrt(n[1:] ** 2 - sigma**2) * eps + sigma * z
        keep, add, fresh = columns(ddim(LINEAR, tau, eta=eta))
        got = keep * (a[:-1] * x0 + n[:-1] * eps) + add * x0 + fresh * z
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@every_schedule
def test_a_step_keeps_the_marginals_of_the_forward_process(schedule, eta):
    """With the true x_0 as D the next state is N(a_s x_0, n_s^2) for every eta (DDIM, Lemma 1)."""
    for steps in STEPS:
        tau = timesteps.uniform(schedule, steps)
        (a, n), (keep, add, sigma) = schedule.at(tau), columns(ddim(schedule, tau, eta=eta))
        np.testing.assert_allclose(keep * a[:-1] + add, a[1:], rtol=1e-12)
        np.testing.assert_allclose(keep**2 * n[:-1] ** 2 + sigma**2, n[1:] ** 2, rtol=1e-10, atol=1e-18)


@every_schedule
def test_small_variance_ddpm_is_ddim_with_eta_one(schedule):
    for steps in STEPS:
        tau = timesteps.uniform(schedule, steps)
        small, one = ddpm(schedule, tau), ddim(schedule, tau, eta=1.0)
        np.testing.assert_allclose(small.update, one.update, rtol=1e-14, atol=1e-16)
        np.testing.assert_array_equal(small.t, one.t)


@pytest.mark.parametrize("build", [schedules.linear, schedules.scaled_linear])
def test_large_variance_ddpm_injects_beta_of_the_respaced_step_and_none_at_the_end(build):
    schedule = build()
    alpha_bar, _ = exact_powers(schedule.betas)
    for steps in STEPS:
        tau = timesteps.uniform(schedule, steps)
        large, small = ddpm(schedule, tau, variance="large"), ddpm(schedule, tau, variance="small")
        np.testing.assert_array_equal(large.update[..., :2], small.update[..., :2])
        wanted = 1 - alpha_bar[tau[:-1]] / alpha_bar[tau[1:]]
        wanted[-1] = 0
        np.testing.assert_allclose(columns(large)[2] ** 2, wanted, rtol=1e-8)
        assert columns(large)[2][-1] == columns(small)[2][-1] == 0


def test_large_variance_at_all_timesteps_is_the_original_beta():
    large = ddpm(LINEAR, timesteps.uniform(LINEAR, T), variance="large")
    np.testing.assert_allclose(columns(large)[2][:-1] ** 2, np.linspace(0.02, 1e-4, T)[:-1], rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@every_schedule
def test_the_last_step_returns_the_denoised_estimate(schedule, eta):
    for steps in STEPS:
        np.testing.assert_array_equal(ddim(schedule, timesteps.uniform(schedule, steps), eta).update[-1], [[0, 1, 0]])


@pytest.mark.parametrize("steps", [1, 2, T])
@every_schedule
def test_every_entry_is_finite_and_the_times_are_those_of_tau(schedule, steps):
    tau = timesteps.uniform(schedule, steps)
    for table in (ddim(schedule, tau), ddim(schedule, tau, 1.0), ddpm(schedule, tau), ddpm(schedule, tau, "large")):
        assert all(np.all(np.isfinite(leaf)) and leaf.dtype == np.float64 for leaf in jax.tree.leaves(table))
        assert table.nfe == steps
        np.testing.assert_array_equal(table.t, tau[:-1])
        np.testing.assert_array_equal(table.tau, tau)
        for level, power in ((table.signal, schedule.alpha_bar), (table.noise, schedule.noise_var)):
            np.testing.assert_allclose(level**2, power[tau[:-1]], rtol=1e-14)


@pytest.mark.parametrize("eta", [-0.01, 1.01, np.nan, np.inf])
def test_eta_outside_zero_to_one_is_refused(eta):
    with refused("eta is .*0..1"):
        ddim(LINEAR, [500, 0], eta=eta)


def test_an_unknown_variance_is_refused_with_the_nearest_name():
    with refused("'smal'.*did you mean 'small'.*large"):
        ddpm(LINEAR, [500, 0], variance="smal")


@pytest.mark.parametrize(
    "tau", [[0], [500], [500, 1], [5, 5, 0], [3, 5, 0], [T + 1, 0], [np.nan, 0], [[5, 0]]], ids=str
)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_a_tau_that_is_no_grid_is_refused(solver, tau):
    with refused("tau"):
        solver(LINEAR, tau)


def test_a_table_with_an_entry_that_is_not_finite_is_refused():
    good = ([2, 1, 0], [2, 1], [0.5, 0.9], [0.8, 0.4], np.ones((2, 1, 3)))
    assert make_table("good", *good).nfe == 2
    for i, label in enumerate(("tau", "t", "signal", "noise", "update")):
        wrong = [np.array(a, np.float64) for a in good]
        wrong[i][1] = np.nan
        with refused(f"{label} is not finite at stage 1"):
            make_table("wrong", *wrong)


def test_a_long_table_prints_its_first_and_last_stages():
    lines = str(ddim(LINEAR, timesteps.uniform(LINEAR, T))).splitlines()
    assert len(lines) <= 33
    assert "1000 network calls" in lines[0]
    assert lines[2].split()[0] == "1000.00"
    assert lines[-1].split()[0] == "1.00"
    assert len(str(ddim(LINEAR, timesteps.uniform(LINEAR, 5))).splitlines()) == 7


class _Cells(HTMLParser):
    """Collects the texts of each row of a table, and fails on a tag that no table has."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.caption, self.open = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "caption", "tr", "th", "td")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "caption":
            self.caption += data
        else:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("steps", [3, 40])
def test_a_notebook_shows_the_numbers_that_are_printed_and_a_name_as_text(steps):
    table = SOLVERS["unipc"](LINEAR, timesteps.uniform(LINEAR, steps))
    table = dataclasses.replace(table, name="<script>alert(1)</script> & co")
    title, header, *lines = str(table).splitlines()
    found = _Cells(table._repr_html_())
    assert found.caption == title
    assert [" ".join(row).split() for row in found.rows[1:]] == [line.replace("|", " ").split() for line in lines]
    assert " ".join(found.rows[0]).split() == header.replace("|", " ").replace("'", "\N{PRIME}").split()


def test_tables_of_one_shape_are_pytrees_of_one_structure():
    """So that a caller's own jit, vmap and tree.map take another eta or grid without compiling again."""
    a, b = ddim(LINEAR, timesteps.uniform(LINEAR, 5)), ddim(LINEAR, timesteps.linspace(LINEAR, 5), eta=0.5)
    assert len(jax.tree.leaves(a)) == 5
    mixed = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    assert isinstance(mixed, SamplerTable)
    np.testing.assert_allclose(mixed.update, (a.update + b.update) / 2)


def moments_by_bookkeeping(table, mean, variance):
    """Follows each register as a linear form in (1, x_init, z_1, z_2, ...), which are independent."""
    registers = np.zeros((table.num_registers, table.nfe + 2))
    registers[0, 1] = 1
    for i in range(table.nfe):
        a, n = table.signal[i], table.noise[i]
        share = a * variance / (a * a * variance + n * n)
        denoised = share * registers[0]
        denoised[0] += mean * (1 - share * a)
        fresh = np.zeros(table.nfe + 2)
        fresh[i + 2] = 1
        registers = table.update[i] @ np.stack([*registers, denoised, fresh])
    return registers[0, 0], np.sum(registers[0, 1:] ** 2)


def random_table(registers, stages, seed):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0.1, 1.5, stages)
    update = rng.normal(0, 0.6, (stages, registers, registers + 2))
    return make_table(
        "random", np.arange(stages, -1, -1), np.arange(stages, 0, -1), np.cos(angle), np.sin(angle), update
    )


@pytest.mark.parametrize(("mean", "variance"), [(0.3, 0.5), (-2.0, 0.0), (0.0, 3.0)])
def test_gaussian_moments_are_those_of_direct_propagation(mean, variance):
    tables = [random_table(registers, 6, seed) for registers in (1, 2, 4) for seed in range(3)]
    tables += [ddim(LINEAR, timesteps.uniform(LINEAR, 10), eta) for eta in (0.0, 0.5, 1.0)]
    for table in tables:
        wanted = moments_by_bookkeeping(table, mean, variance)
        np.testing.assert_allclose(gaussian_moments(table, mean, variance), wanted, rtol=1e-11, atol=1e-13)


@every_schedule
def test_a_point_mass_is_sampled_exactly_by_every_table(schedule):
    for solver in (ddim, ddpm):
        for steps in (1, 2, 10):
            moments = gaussian_moments(solver(schedule, timesteps.uniform(schedule, steps)), 0.4, 0.0)
            np.testing.assert_allclose(moments, (0.4, 0.0), atol=1e-12)


def order(steps, errors):
    """Observed order: minus the slope of log error over log steps."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("variance", [0.25, 1.5])
@pytest.mark.parametrize(
    ("schedule", "grid"),
    [(LINEAR, "log_snr"), (SCHEDULES["cosine"], "log_snr"), (schedules.cosine(8000), "uniform")],
    ids=["linear-log_snr", "cosine-log_snr", "cosine-uniform"],
)
def test_the_variance_error_of_ddim_on_gaussian_data_falls_as_one_over_the_steps(schedule, grid, variance, eta):
    steps = np.array([50, 100, 200, 400, 800])
    tables = [ddim(schedule, timesteps.GRIDS[grid](schedule, s), eta) for s in steps]
    errors = np.abs([gaussian_moments(table, 0.5, variance)[1] - variance for table in tables])
    assert np.all(np.diff(errors) < 0)
    assert abs(order(steps, errors) - 1) < 0.15


@pytest.mark.usefixtures("float64")
def test_ddim_solves_the_probability_flow_of_a_mixture_to_first_order():
    """From T down to t = 1, where lambda is still finite; in r = n / a, the state y = x / a obeys dy / dr = eps."""
    x_init = np.linspace(-2.5, 2.5, 11)
    (a_top, a_end), (n_top, n_end) = LINEAR.at([T, 1])

    def slope(log_r, y):  # dy / d log r = r eps = y - D
        a = 1 / np.sqrt(1 + np.exp(2 * log_r))
        return y - mixture_denoiser(a * y, a, a * np.exp(log_r))

    span = np.log([n_top / a_top, n_end / a_end])
    reference = a_end * solve_ivp(slope, span, x_init / a_top, method="DOP853", rtol=1e-9, atol=1e-9).y[:, -1]

    network = ideal_network(LINEAR, lambda x, a, n: mixture_denoiser(x, a, n, jnp))
    for grid in (timesteps.log_snr, timesteps.karras):
        steps, errors = [40, 80, 160], []
        for number in steps:
            table = ddim(LINEAR, grid(LINEAR, number + 1))
            assert table.t[-1] == 1
            start = {"prediction": "x0", "x_init": x_init[:, None], "return_trajectory": True}
            _, path = diffusion.sample(network, {}, table, jax.random.key(0), 11, (1,), **start)
            errors.append(np.sqrt(np.mean((path.x[-2, :, 0] - reference) ** 2)))
        assert abs(order(steps, errors) - 1) < 0.15
        assert errors[-1] < 0.05


def test_the_ideal_denoisers_agree_with_numerical_integration():
    """Guards the references: E[x_0 | x_t] by quadrature over x_0."""
    grid = np.linspace(-6, 6, 200_001)
    for a, n, x in ((0.3, 0.95, -0.4), (0.8, 0.6, 1.1)):
        likelihood = np.exp(-0.5 * ((x - a * grid) / n) ** 2)
        weights = np.exp(-0.5 * (grid - 0.2) ** 2 / 0.3) * likelihood
        np.testing.assert_allclose(gaussian_denoiser(x, a, n, 0.2, 0.3), np.average(grid, weights=weights), rtol=1e-8)

        prior = sum(
            w / np.sqrt(v) * np.exp(-0.5 * (grid - m) ** 2 / v)
            for m, v, w in zip(MEANS, VARIANCES, WEIGHTS, strict=True)
        )
        wanted = np.average(grid, weights=prior * likelihood)
        np.testing.assert_allclose(mixture_denoiser(np.array(x), a, n), wanted, rtol=1e-8)
