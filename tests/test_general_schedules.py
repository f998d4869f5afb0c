"""Laws of schedules whose signal and noise powers need not add up to 1, and of what is built on them."""

import numpy as np
import pytest
from reference import refused

from diffusion import gaussian, schedules, timesteps
from diffusion.solvers import SOLVERS, analytic_dpm, ddim, gaussian_moments

T = 60
RNG = np.random.default_rng(0)
RATIOS = np.cumsum(RNG.uniform(0.01, 0.3, T))
"""noise / signal of a schedule with no structure at all."""
SIGNAL = RNG.uniform(0.2, 3, T)
GENERAL = {
    "edm": schedules.edm(T),
    "edm_rho_1": schedules.edm(T, 0.01, 5.0, 1.0),
    "rectified_flow": schedules.rectified_flow(T),
    "random": schedules.from_signal_noise(np.append(1, SIGNAL), np.append(0, SIGNAL * RATIOS)),
}
EVERY = {**GENERAL, "shifted_cosine": schedules.shifted_cosine(T, 256)}
general_schedules = pytest.mark.parametrize("schedule", GENERAL.values(), ids=GENERAL.keys())
every_schedule = pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY.keys())

NEEDS_SIGNAL = {"analytic_dpm", "dpm_solver", "dpm_solver_multistep", "deis", "lms", "ipndm", "plms", "pndm", "heun"}
NEEDS_SIGNAL |= {"edm", "er_sde", "restart", "rk"}
"""Solvers in eps, or, as Analytic-DPM, with an estimate made of it."""
DATA_VARIANCE = 0.3


def ideal_gamma(schedule, tau, variance=DATA_VARIANCE):
    """E |eps_hat|^2 / d of the ideal denoiser of Gaussian data: the share of x's variance that is noise."""
    signal, noise = schedule.at(tau[:-1])
    return noise**2 / (signal**2 * variance + noise**2)


BUILDERS = {
    **{name: solver for name, solver in SOLVERS.items() if name != "analytic_dpm"},
    "analytic_dpm": lambda schedule, tau: analytic_dpm(schedule, tau, ideal_gamma(schedule, tau)),
}


# Formulas


@pytest.mark.parametrize(("image_size", "base_size"), [(128, 64), (512, 32), (64, 64), (32, 64), (100, 64)])
def test_shifted_cosine_has_the_snr_of_cosine_times_the_squared_ratio_of_sizes(image_size, base_size):
    shifted, plain = schedules.shifted_cosine(1000, image_size, base_size), schedules.cosine(1000)
    snr = shifted.alpha_bar[1:] / shifted.noise_var[1:]
    wanted = plain.alpha_bar[1:] / plain.noise_var[1:] * (base_size / image_size) ** 2
    np.testing.assert_allclose(snr, wanted, rtol=1e-13)
    np.testing.assert_allclose(shifted.alpha_bar + shifted.noise_var, 1, rtol=0, atol=1e-15)
    assert (shifted.alpha_bar[0], shifted.noise_var[0]) == (1, 0)


@pytest.mark.parametrize(("sigma_min", "sigma_max", "rho"), [(0.002, 80.0, 7.0), (0.05, 10.0, 3.0), (1.0, 2.0, 1.0)])
def test_edm_levels_are_equation_5_and_its_signal_is_one(sigma_min, sigma_max, rho):
    number = 18
    schedule = schedules.edm(number, sigma_min, sigma_max, rho)
    i = np.arange(number)
    wanted = (sigma_max ** (1 / rho) + i / (number - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    np.testing.assert_allclose(schedule.at(number - i)[1], wanted, rtol=1e-12)
    np.testing.assert_array_equal(schedule.alpha_bar, 1)
    assert schedule.noise_var[0] == 0


def test_the_karras_grid_of_edm_is_equation_5_for_any_number_of_steps():
    """Up to the curvature of sigma between the timesteps, where the schedule is linear; exact at all of them."""
    schedule = schedules.edm(1000)
    np.testing.assert_allclose(timesteps.karras(schedule, 1000), np.arange(1000, -1, -1), rtol=0, atol=1e-8)
    sigma = schedule.at(timesteps.karras(schedule, 10)[:-1])[1]
    np.testing.assert_allclose(sigma, np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10) ** 7, rtol=1e-9)


def test_rectified_flow_mixes_data_and_noise_in_straight_lines():
    t = np.concatenate([np.arange(T + 1), RNG.uniform(0, T, 200)])
    signal, noise = schedules.rectified_flow(T).at(t)
    np.testing.assert_allclose(signal, 1 - t / T, rtol=0, atol=1e-15)
    np.testing.assert_allclose(noise, t / T, rtol=0, atol=1e-15)


# Between timesteps


@general_schedules
def test_signal_and_noise_are_linear_between_timesteps(schedule):
    t = RNG.uniform(0, T, 500)
    for got, power in zip(schedule.at(t), (schedule.alpha_bar, schedule.noise_var), strict=True):
        np.testing.assert_allclose(got, np.interp(t, np.arange(T + 1), np.sqrt(power)), rtol=1e-12)


@every_schedule
def test_at_powers_and_half_log_snr_say_the_same(schedule):
    t = np.concatenate([RNG.uniform(1e-3, T, 300), np.arange(1, T)])
    (signal, noise), (alpha_bar, noise_var) = schedule.at(t), schedule.powers(t)
    np.testing.assert_allclose(signal**2, alpha_bar, rtol=1e-14)
    np.testing.assert_allclose(noise**2, noise_var, rtol=1e-14)
    np.testing.assert_allclose(schedule.half_log_snr(t), np.log(signal / noise), rtol=1e-10, atol=1e-12)


@every_schedule
def test_time_of_inverts_half_log_snr_at_real_times(schedule):
    t = np.sort(np.concatenate([np.linspace(0, T, 997)[:-1], np.arange(T), [1e-6, T - 1e-6]]))
    half_log_snr = schedule.half_log_snr(t)
    assert np.all(np.diff(half_log_snr[np.append(True, np.diff(t) > 0)]) < 0)
    np.testing.assert_allclose(schedule.time_of(half_log_snr), t, rtol=1e-9, atol=1e-12)


@every_schedule
def test_time_of_the_lowest_half_log_snr_is_the_last_timestep(schedule):
    """Also where it is minus infinity, at zero signal; and never past the end, where no power is defined."""
    last = schedule.time_of(schedule.half_log_snr(T))
    assert last <= T
    np.testing.assert_allclose(last, T, rtol=1e-12)


@every_schedule
def test_a_whole_time_gives_the_stored_power_to_the_last_bit(schedule):
    alpha_bar, noise_var = schedule.powers(np.arange(T + 1))
    np.testing.assert_array_equal(alpha_bar, schedule.alpha_bar)
    np.testing.assert_array_equal(noise_var, schedule.noise_var)


# Refusals


@pytest.mark.parametrize(
    ("signal", "noise"),
    [
        ([1.0], [0.0]),
        ([1.0, 0.5], [0.0, 0.5, 1.0]),
        ([[1.0, 0.5]], [[0.0, 0.5]]),
        ([0.9, 0.5], [0.0, 0.5]),
        ([1.0, 0.5], [0.1, 0.5]),
        ([1.0, -0.5], [0.0, 0.5]),
        ([1.0, 0.5], [0.0, -0.5]),
        ([1.0, 0.5, 0.5], [0.0, 0.5, 0.5]),
        ([1.0, 0.5, 0.6], [0.0, 0.5, 0.5]),
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.5]),
        ([1.0, 0.0, 0.0], [0.0, 0.5, 1.0]),
        ([1.0, np.nan], [0.0, 0.5]),
        ([1.0, 0.5], [0.0, np.nan]),
        ([1.0, 1.0], [0.0, np.inf]),
    ],
    ids=str,
)
def test_signal_and_noise_that_make_no_process_are_refused(signal, noise):
    with refused("signal"):
        schedules.from_signal_noise(signal, noise)


@pytest.mark.parametrize(
    "build",
    [
        lambda: schedules.edm(T, sigma_min=0.0),
        lambda: schedules.edm(T, sigma_min=2.0, sigma_max=2.0),
        lambda: schedules.edm(T, sigma_max=np.inf),
        lambda: schedules.edm(T, sigma_max=np.nan),
        lambda: schedules.edm(T, rho=0.0),
        lambda: schedules.edm(0),
        lambda: schedules.edm(2.5),
        lambda: schedules.rectified_flow(0),
        lambda: schedules.shifted_cosine(0),
        lambda: schedules.shifted_cosine(T, image_size=0),
        lambda: schedules.shifted_cosine(T, base_size=-64),
        lambda: schedules.shifted_cosine(T, image_size=np.nan),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(build):
    with refused():
        build()


@pytest.mark.parametrize("name", GENERAL)
def test_zero_terminal_snr_does_not_turn_another_process_into_a_variance_preserving_one(name):
    """Its algorithm reads signal alone and takes the noise to be what is missing to 1."""
    with refused("variance"):
        schedules.zero_terminal_snr(GENERAL[name])


# The Gaussian process


def pairs():
    t, s = np.tril_indices(T + 1, -1)
    return t, s


def conditioned(schedule, t, s, x_t, x_0):
    """Mean and variance of x_s given x_t and x_0, from the joint covariance of (x_s, x_t) given x_0."""
    (a_t, a_s), (n_t, n_s) = (np.sqrt(power[[t, s]]) for power in (schedule.alpha_bar, schedule.noise_var))
    # x_t = (a_t / a_s) x_s + fresh noise, and x_s = a_s x_0 + n_s eps.
    covariance = np.array([[n_s**2, a_t / a_s * n_s**2], [a_t / a_s * n_s**2, n_t**2]])
    gain = covariance[0, 1] / covariance[1, 1]
    return a_s * x_0 + gain * (x_t - a_t * x_0), np.linalg.det(covariance) / covariance[1, 1]


@pytest.mark.usefixtures("float64")
@general_schedules
def test_q_sample_is_signal_plus_noise(schedule):
    x_0, eps = RNG.standard_normal((2, T + 1, 3))
    wanted = np.sqrt(schedule.alpha_bar)[:, None] * x_0 + np.sqrt(schedule.noise_var)[:, None] * eps
    got = gaussian.q_sample(schedule, x_0, np.arange(T + 1), eps)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
@general_schedules
def test_posterior_is_gaussian_conditioning(schedule):
    t, s = pairs()
    x_t, x_0 = RNG.standard_normal((2, t.size))
    wanted = np.array([conditioned(schedule, *row) for row in zip(t, s, x_t, x_0, strict=True)])
    mean, variance = gaussian.posterior(schedule, x_t, x_0, t, s)
    np.testing.assert_allclose(mean, wanted[:, 0], rtol=1e-9, atol=1e-11)
    scale = schedule.noise_var[s]
    assert np.all(np.abs(variance - wanted[:, 1]) <= 1e-10 * scale)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@general_schedules
def test_ddim_sigma_is_eta_times_the_posteriors_std_and_keeps_the_marginal(schedule, eta):
    t, s = pairs()
    a, n = np.sqrt(schedule.alpha_bar), np.sqrt(schedule.noise_var)
    wanted = eta * n[s] / n[t] * np.sqrt(n[t] ** 2 - (a[t] / a[s]) ** 2 * n[s] ** 2)
    sigma = gaussian.ddim_sigma(schedule, t, s, eta)
    np.testing.assert_allclose(sigma, wanted, rtol=1e-9, atol=1e-14)
    kept, fresh = gaussian.split_noise(schedule, t, s, eta)
    np.testing.assert_allclose(kept**2 + fresh**2, 1, rtol=1e-12)
    np.testing.assert_allclose(fresh * n[s], wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@general_schedules
def test_a_ddim_step_keeps_the_marginals_of_the_process(schedule, eta):
    for steps in (1, 2, 7, T):
        tau = timesteps.uniform(schedule, steps)
        (a, n), table = schedule.at(tau), ddim(schedule, tau, eta)
        keep, add, sigma = table.update[:, 0].T
        np.testing.assert_allclose(keep * a[:-1] + add, a[1:], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose((keep * n[:-1]) ** 2 + sigma**2, n[1:] ** 2, rtol=1e-10, atol=1e-18)


# Solvers


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", BUILDERS)
@pytest.mark.parametrize("name", ["edm", "rectified_flow"])
def test_every_solver_takes_the_schedule_or_refuses_to_start_at_zero_signal(name, solver, steps):
    schedule = GENERAL[name]
    tau = timesteps.uniform(schedule, steps)
    if name == "rectified_flow" and solver in NEEDS_SIGNAL:
        with refused("signal"):
            BUILDERS[solver](schedule, tau)
        tau = timesteps.explicit(schedule, np.linspace(0.9 * T, 0, steps + 1))
    table = BUILDERS[solver](schedule, tau)
    assert all(np.all(np.isfinite(v)) for v in (table.t, table.signal, table.noise, table.update))
    np.testing.assert_array_equal(table.tau, tau)
    for got, wanted in zip((table.signal, table.noise), schedule.at(table.t), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", sorted(set(BUILDERS) - {"analytic_dpm"}))
@pytest.mark.parametrize("name", ["edm", "rectified_flow", "random"])
def test_a_point_mass_is_sampled_exactly_by_every_solver(name, solver, steps):
    schedule = GENERAL[name]
    table = BUILDERS[solver](schedule, timesteps.explicit(schedule, np.linspace(0.9 * T, 0, steps + 1)))
    np.testing.assert_allclose(gaussian_moments(table, 0.4, 0.0), (0.4, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["edm", "rectified_flow", "random"])
def test_the_analytic_variance_keeps_the_marginals_of_gaussian_data(name, eta):
    """The last step returns D, whose variance is less by E Var(x_0 | x_t) at the last time."""
    schedule = GENERAL[name]
    for steps in (1, 2, 5):
        tau = timesteps.explicit(schedule, np.linspace(0.9 * T, 0, steps + 1))
        table = analytic_dpm(schedule, tau, ideal_gamma(schedule, tau), eta)
        (a, *_, a_last), (n, *_, n_last) = table.signal[[0, -1]], table.noise[[0, -1]]
        start = (0.2 * a, a**2 * DATA_VARIANCE + n**2)
        lost = DATA_VARIANCE * n_last**2 / (a_last**2 * DATA_VARIANCE + n_last**2)
        wanted = (0.2, DATA_VARIANCE - lost)
        np.testing.assert_allclose(gaussian_moments(table, 0.2, DATA_VARIANCE, start), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "top"),
    [(schedules.edm(1000), 1000), (schedules.rectified_flow(1000), 1000), (schedules.rectified_flow(1000), 800)],
    ids=["edm", "rectified_flow", "rectified_flow_from_below"],
)
def test_ddim_tends_to_the_flow_of_gaussian_data_at_first_order(schedule, top):
    """The flow is x_0 = mu + sqrt(v_0 / v_T) (x_T - a_T mu), v_T = a_T^2 v_0 + n_T^2: known mean and variance."""
    mean, variance, steps = 0.7, 0.25, np.array([40, 80, 160, 320])
    a, n = schedule.at(top)
    stretch = variance / (a**2 * variance + n**2)
    wanted = (mean * (1 - a * stretch**0.5), stretch * (a**2 + n**2))
    tables = [ddim(schedule, timesteps.explicit(schedule, np.linspace(top, 0, s + 1))) for s in steps]
    errors = np.abs([gaussian_moments(table, mean, variance) for table in tables] - np.array(wanted))
    slopes = -np.polyfit(np.log(steps), np.log(errors + 1e-300), 1)[0]
    assert abs(slopes[1] - 1) < 0.15
    if a == 0:
        assert np.max(errors[:, 0]) < 1e-12  # from pure noise the mean is right whatever the steps
    else:
        assert abs(slopes[0] - 1) < 0.15


@pytest.mark.parametrize("schedule", [schedules.edm(1000), schedules.rectified_flow(1000)], ids=["edm", "flow"])
def test_stochastic_ddim_tends_to_gaussian_data_at_first_order(schedule):
    mean, variance, steps = 0.7, 0.25, np.array([40, 80, 160, 320])
    a, n = schedule.at(1000)
    start = (a * mean, a**2 * variance + n**2)
    tables = [ddim(schedule, timesteps.explicit(schedule, np.linspace(1000, 0, s + 1)), 1.0) for s in steps]
    moments = np.array([gaussian_moments(table, mean, variance, start) for table in tables])
    np.testing.assert_allclose(moments[:, 0], mean, rtol=1e-12)
    slope = -np.polyfit(np.log(steps), np.log(np.abs(moments[:, 1] - variance)), 1)[0]
    assert abs(slope - 1) < 0.15
