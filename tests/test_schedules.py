"""Laws of the noise schedules."""

import jax
import numpy as np
import pytest
from reference import exact_powers, refused

from diffusion import schedules
from diffusion.model import make_schedule

T = 1000
STEPS = np.arange(T) / (T - 1)
BETAS = {
    "linear": (schedules.linear, 1e-4 + STEPS * (0.02 - 1e-4)),
    "scaled_linear": (schedules.scaled_linear, (0.00085**0.5 + STEPS * (0.012**0.5 - 0.00085**0.5)) ** 2),
}
RANDOM_BETAS = np.random.default_rng(0).uniform(1e-6, 0.3, 100)
ALL = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "linear_4000": schedules.linear(4000),
    "random": schedules.from_betas(RANDOM_BETAS),
    "one_step": schedules.from_betas([0.3]),
}
ZERO_SNR = {
    f"{name}_zero_snr": schedules.zero_terminal_snr(ALL[name]) for name in ("linear", "scaled_linear", "cosine")
}
EVERY = {**ALL, **ZERO_SNR}
every_schedule = pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY.keys())


@pytest.mark.parametrize(
    "betas",
    [np.linspace(1e-4, 0.02, T), np.linspace(1e-4, 0.02, 4000), np.full(T, 1e-9), RANDOM_BETAS, [0.5], [0.1, 1.0]],
    ids=["linear", "linear_4000", "tiny", "random", "single", "ends_at_one"],
)
def test_alpha_bar_is_the_cumulative_product_and_noise_var_its_complement(betas):
    schedule = schedules.from_betas(betas)
    alpha_bar, noise_var = exact_powers(betas)
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(schedule.noise_var, noise_var, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bar, np.cumprod([1.0, *(1 - np.asarray(betas))]), rtol=1e-12)


@pytest.mark.parametrize("name", BETAS)
def test_a_named_schedule_follows_its_formula(name):
    build, betas = BETAS[name]
    alpha_bar, noise_var = exact_powers(betas)
    np.testing.assert_allclose(build().alpha_bar, alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(build().noise_var, noise_var, rtol=1e-11)


def test_cosine_is_a_squared_cosine_with_a_clipped_end():
    schedule = schedules.cosine(T, offset=0.008, max_beta=0.999)
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:T], f[:T] / f[0], rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bar[T] / schedule.alpha_bar[T - 1], 1 - 0.999, rtol=1e-9)
    clipped = schedules.cosine(T, max_beta=0.1)
    assert np.isclose(np.max(1 - clipped.alpha_bar[1:] / clipped.alpha_bar[:-1]), 0.1)


@every_schedule
def test_clean_data_has_all_signal_and_no_noise(schedule):
    assert schedule.alpha_bar[0] == 1
    assert schedule.noise_var[0] == 0
    assert schedule.alpha_bar.shape == schedule.noise_var.shape == (schedule.num_timesteps + 1,)
    assert schedule.alpha_bar.dtype == schedule.noise_var.dtype == np.float64


@every_schedule
def test_signal_and_noise_power_sum_to_one(schedule):
    np.testing.assert_allclose(schedule.alpha_bar + schedule.noise_var, 1, rtol=1e-15)
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    assert np.all(np.diff(schedule.noise_var) >= 0)


@pytest.mark.parametrize("num_timesteps", [1, 10, 1000, 4000])
def test_betas_are_those_the_schedule_was_made_of(num_timesteps):
    betas = np.linspace(1e-4, 0.02, num_timesteps)
    np.testing.assert_allclose(schedules.from_betas(betas).betas, betas, rtol=1e-9)


@pytest.mark.parametrize(
    "betas",
    [[0.0], [0.1, 0.0], [-0.1, 0.1], [1.0, 0.1], [0.1, 1.1], [np.nan], [0.1, np.inf], [], [[0.1, 0.2]], 0.1],
    ids=str,
)
def test_betas_outside_zero_to_one_are_refused(betas):
    with refused():
        schedules.from_betas(betas)


def test_a_wrong_beta_is_named_by_its_timestep():
    with refused("timestep 2 is 1.5"):
        schedules.from_betas([0.1, 1.5, 0.1])


def test_alpha_bar_descends_strictly_or_the_betas_are_refused():
    try:
        schedule = schedules.from_betas([0.9] * 2000)  # 10^-2000 is no float64
    except ValueError:
        return
    assert np.all(np.diff(schedule.alpha_bar) < 0)


@pytest.mark.parametrize("num_timesteps", [0, -1, 2.5])
@pytest.mark.parametrize("build", schedules.SCHEDULES.values(), ids=schedules.SCHEDULES.keys())
def test_a_schedule_needs_a_whole_number_of_timesteps(build, num_timesteps):
    with refused("num_timesteps"):
        build(num_timesteps)


def test_a_negative_cosine_offset_is_refused():
    with refused("offset"):
        schedules.cosine(offset=-0.1)


@every_schedule
def test_half_log_snr_descends_strictly_from_infinity(schedule):
    t = np.linspace(0, schedule.num_timesteps, 3 * schedule.num_timesteps + 1)
    half_log_snr = schedule.half_log_snr(t)
    assert half_log_snr[0] == np.inf
    assert np.all(np.diff(half_log_snr) < 0)
    inside = half_log_snr[1:-1]
    ratio = np.exp(2 * inside)  # alpha_bar / noise_var
    np.testing.assert_allclose(ratio / (1 + ratio), schedule.powers(t[1:-1])[0], rtol=1e-10)


@every_schedule
def test_time_of_inverts_half_log_snr_at_real_times(schedule):
    t = np.random.default_rng(1).uniform(0, schedule.num_timesteps, 2000)
    t = np.concatenate([t, np.arange(schedule.num_timesteps + 1.0), [1e-9, 1e-3]])
    np.testing.assert_allclose(schedule.time_of(schedule.half_log_snr(t)), t, rtol=1e-8, atol=1e-11)


def test_time_of_refuses_a_noise_level_beyond_the_schedule():
    schedule = schedules.linear()
    with refused("half log-SNR"):
        schedule.time_of([0.0, schedule.half_log_snr(T) - 0.01])
    with refused("half log-SNR"):
        schedule.time_of(np.nan)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_maps_the_signal_affinely_to_exactly_zero(name):
    before, after = ALL[name], ZERO_SNR[f"{name}_zero_snr"]
    assert after.alpha_bar[-1] == 0
    assert after.noise_var[-1] == 1
    assert after.half_log_snr(T) == -np.inf
    np.testing.assert_allclose(after.alpha_bar[1], before.alpha_bar[1], rtol=1e-14)
    first, last = np.sqrt(before.alpha_bar[[1, -1]])
    wanted = (np.sqrt(before.alpha_bar[1:]) - last) * first / (first - last)
    np.testing.assert_allclose(np.sqrt(after.alpha_bar[1:]), wanted, rtol=1e-10)
    again = schedules.zero_terminal_snr(after)
    np.testing.assert_allclose(again.alpha_bar, after.alpha_bar, rtol=1e-10)


def test_zero_terminal_snr_needs_two_timesteps():
    with refused("2 timesteps"):
        schedules.zero_terminal_snr(schedules.from_betas([0.5]))
    assert schedules.zero_terminal_snr(schedules.linear(2)).alpha_bar[-1] == 0


@every_schedule
def test_a_whole_time_gives_the_stored_power_to_the_last_bit(schedule):
    for t in (np.arange(schedule.num_timesteps + 1), np.arange(schedule.num_timesteps + 1.0)):
        alpha_bar, noise_var = schedule.powers(t)
        np.testing.assert_array_equal(alpha_bar, schedule.alpha_bar)
        np.testing.assert_array_equal(noise_var, schedule.noise_var)
        signal, noise = schedule.at(t)
        np.testing.assert_array_equal(signal, np.sqrt(schedule.alpha_bar))
        np.testing.assert_array_equal(noise, np.sqrt(schedule.noise_var))


@every_schedule
def test_powers_are_continuous_in_time(schedule):
    whole = np.arange(1.0, schedule.num_timesteps)
    for step in (-1e-10, 1e-10):
        for near, exact in zip(schedule.powers(whole + step), schedule.powers(whole), strict=True):
            np.testing.assert_allclose(near, exact, rtol=1e-7)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
def test_log_alpha_bar_is_linear_between_whole_times(schedule):
    t = np.random.default_rng(2).uniform(0, schedule.num_timesteps, 500)
    lower, weight = np.floor(t).astype(int), t - np.floor(t)
    wanted = schedule.alpha_bar[lower] ** (1 - weight) * schedule.alpha_bar[lower + 1] ** weight
    np.testing.assert_allclose(schedule.powers(t)[0], wanted, rtol=1e-12)


def test_noise_near_clean_data_keeps_its_relative_precision():
    t = 10.0 ** np.arange(-12, 0)
    wanted = -np.expm1(t * np.log1p(-1e-4))  # 1 - (1 - beta_1)^t
    np.testing.assert_allclose(schedules.linear().powers(t)[1], wanted, rtol=1e-10)


@pytest.mark.parametrize("t", [-1e-9, -1, T + 1, T + 1e-6, np.nan, [3, T + 1]], ids=str)
def test_a_time_outside_the_schedule_is_refused(t):
    for method in ("powers", "at", "half_log_snr"):
        with refused(f"0..{T}"):
            getattr(schedules.linear(), method)(t)


@every_schedule
def test_a_schedule_keeps_its_relative_precision_through_jit_in_float32(schedule):
    passed = jax.jit(lambda s: s)(schedule)
    assert passed.noise_var.dtype == np.float32
    assert passed.num_timesteps == schedule.num_timesteps
    half_ulp = 2.0**-24
    np.testing.assert_allclose(np.asarray(passed.noise_var, np.float64), schedule.noise_var, rtol=1.01 * half_ulp)
    np.testing.assert_allclose(np.asarray(passed.alpha_bar, np.float64), schedule.alpha_bar, rtol=1.01 * half_ulp)


def test_every_schedule_can_be_named_in_a_config_with_the_defaults_of_its_function():
    for name, build in schedules.SCHEDULES.items():
        np.testing.assert_array_equal(make_schedule(name).alpha_bar, build().alpha_bar)
