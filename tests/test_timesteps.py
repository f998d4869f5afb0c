"""Laws of the grids tau, for every number of steps."""

from fractions import Fraction

import numpy as np
import pytest
from reference import refused
from scipy import stats

from diffusion import schedules, timesteps
from diffusion.errors import InputError
from diffusion.timesteps import noise

LINEAR = schedules.linear()
T = LINEAR.num_timesteps
GRIDS = pytest.mark.parametrize("name", timesteps.GRIDS)
BY_NOISE = ("log_snr", "karras", "polyexponential", "kl_optimal")  # refused where lambda is infinite
TO_THE_TOP = {"uniform", "strided", "linspace", "trailing", *BY_NOISE, "beta", "shifted"}


def ceil_div(a, b):
    return -(-a // b)


def assert_grid(schedule, name, steps):
    total = schedule.num_timesteps
    tau = timesteps.GRIDS[name](schedule, steps)
    wanted = ceil_div(total, ceil_div(total, steps)) if name == "strided" else steps
    assert tau.shape == (wanted + 1,), (total, steps)
    assert tau.dtype in (np.int64, np.float64)
    assert np.all(np.diff(tau) < 0), (total, steps)
    assert tau[-1] == 0
    assert 1 <= tau[-2] <= tau[0] <= total, (total, steps)
    if name in TO_THE_TOP:
        assert tau[0] == total


@GRIDS
def test_a_grid_has_the_steps_asked_for_and_descends_to_zero_for_every_number_of_steps(name):
    for steps in range(1, T + 1):
        assert_grid(LINEAR, name, steps)


with_signal_at_the_top = pytest.mark.parametrize(
    "build",
    [build for build in schedules.SCHEDULES.values() if build().alpha_bar[-1] > 0],
    ids=lambda build: build.__name__,
)


@GRIDS
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100])
def test_short_schedules_have_a_grid_for_every_number_of_steps(name, total):
    for build in schedules.SCHEDULES.values():
        schedule = build(total)
        if name in BY_NOISE and schedule.alpha_bar[-1] == 0:
            with refused("infinite at zero terminal SNR"):
                timesteps.GRIDS[name](schedule, 1)
            continue
        for steps in range(1, total + 1):
            assert_grid(schedule, name, steps)


@GRIDS
def test_other_schedules_have_a_grid_for_every_number_of_steps(name):
    for build in (schedules.cosine, schedules.scaled_linear):
        for steps in [*range(1, T, 37), T - 1, T]:
            assert_grid(build(), name, steps)


@GRIDS
@pytest.mark.parametrize("steps", [0, -1, T + 1, 2.5])
def test_a_number_of_steps_outside_one_to_the_timesteps_is_refused(name, steps):
    with refused(f"1..{T}"):
        timesteps.GRIDS[name](LINEAR, steps)


@pytest.mark.parametrize("steps", [np.nan, np.inf, None, "ten"], ids=str)
def test_a_number_of_steps_that_is_no_number_is_refused_in_one_line(steps):
    with refused(f"1..{T}"):
        timesteps.uniform(LINEAR, steps)


@pytest.mark.parametrize("total", [1, 7, 100, T])
def test_uniform_is_the_rounded_even_division(total):
    schedule = schedules.linear(total)
    for steps in range(1, total + 1):
        wanted = [round(Fraction(total * (steps - i), steps)) for i in range(steps + 1)]
        np.testing.assert_array_equal(timesteps.uniform(schedule, steps), wanted)


def test_strided_updates_every_ceil_of_timesteps_over_steps():
    for steps in range(1, T + 1):
        stride = ceil_div(T, steps)
        tau, t = [T], T
        while t > 0:
            t = max(t - stride, 0)
            tau.append(t)
        np.testing.assert_array_equal(timesteps.strided(LINEAR, steps), tau)


def test_strided_reports_fewer_steps_where_they_do_not_divide_the_timesteps():
    assert timesteps.strided(LINEAR, 600).size - 1 == 500


def test_linspace_is_rounded_reals_from_one_to_the_top():
    np.testing.assert_array_equal(timesteps.linspace(LINEAR, 1), [T, 0])
    for steps in range(2, T + 1):
        tau = timesteps.linspace(LINEAR, steps)
        assert tau[0] == T
        assert tau[-2] == 1
        # |tau_i - (1 + (T - 1) i / (S - 1))| <= 1/2, times 2 (S - 1)
        distance = 2 * (steps - 1) * (tau[-2::-1] - 1) - 2 * (T - 1) * np.arange(steps)
        assert np.all(np.abs(distance) <= steps - 1)


@pytest.mark.parametrize("total", [10, 100, T])
def test_quadratic_is_the_published_formula_until_it_repeats_itself(total):
    schedule = schedules.linear(total)
    for steps in range(2, total + 1):
        # floor((k sqrt(0.8 T) / (S - 1))^2) + 1 in exact arithmetic
        published = [4 * total * k * k // (5 * (steps - 1) ** 2) + 1 for k in range(steps)]
        if len(set(published)) < steps:
            break
        np.testing.assert_array_equal(timesteps.quadratic(schedule, steps), [*published[::-1], 0])
    assert total != T or steps == 30
    assert timesteps.quadratic(schedule, 1)[0] == 0.8 * total + 1


def test_quadratic_moves_a_repeated_timestep_no_further_than_needed():
    for steps in (30, 50, 100, 300):
        published = [4 * T * k * k // (5 * (steps - 1) ** 2) + 1 for k in range(steps)]
        wanted, last = [], 0
        for t in published:
            last = max(t, last + 1)
            wanted.append(last)
        np.testing.assert_array_equal(timesteps.quadratic(LINEAR, steps), [*wanted[::-1], 0])


def test_leading_is_the_formula_of_diffusers_counted_from_one():
    for steps in range(1, T + 1):
        theirs = (np.arange(0, steps) * (T // steps)).round()[::-1].astype(np.int64)
        np.testing.assert_array_equal(timesteps.leading(LINEAR, steps), [*(theirs + 1), 0])


def test_trailing_is_the_formula_of_diffusers_counted_from_one():
    """Theirs adds up float steps, which decides ties by rounding errors and can give one timestep too many."""
    compared = 0
    for steps in range(1, T + 1):
        theirs = np.round(np.arange(T, 0, -T / steps)).astype(np.int64) - 1
        exact = [T - Fraction(i * T, steps) for i in range(steps)]
        if len(theirs) == steps and not any(t.denominator == 2 for t in exact):
            np.testing.assert_array_equal(timesteps.trailing(LINEAR, steps), [*(theirs + 1), 0])
            compared += 1
    assert compared > 700


@with_signal_at_the_top
def test_log_snr_is_even_in_lambda_from_the_top_to_one(build):
    schedule = build()
    for steps in (2, 3, 10, 25, 100):
        tau = timesteps.log_snr(schedule, steps)
        gaps = np.diff(schedule.half_log_snr(tau[:-1]))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-6)
        assert (tau[0], tau[-2], tau[-1]) == (T, 1, 0)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@with_signal_at_the_top
def test_karras_is_even_in_a_root_of_noise_over_signal(build, rho):
    schedule = build()
    for steps in (2, 3, 10, 25, 100):
        tau = timesteps.karras(schedule, steps, rho=rho)
        signal, noise = schedule.at(tau[:-1])
        gaps = np.diff((noise / signal) ** (1 / rho))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-6)
        assert (tau[0], tau[-2], tau[-1]) == (T, 1, 0)


@pytest.mark.parametrize("name", BY_NOISE)
def test_a_grid_in_log_snr_is_refused_where_it_is_infinite(name):
    with refused("zero terminal SNR"):
        timesteps.GRIDS[name](schedules.zero_terminal_snr(LINEAR), 10)


def space_timesteps(total, counts):
    """Improved DDPM's rule, in its order of float operations; timesteps count from 0, ascending."""
    taken, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (1 if i < total % len(counts) else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += size
    return taken


@pytest.mark.parametrize(
    ("total", "spec"),
    [(1000, "10,15,20"), (300, "10,15,20"), (1000, "250"), (1000, "90,60,60,20,20"), (1000, "21"), (10, "4,3,3")],
)
def test_sections_are_those_of_improved_ddpm(total, spec):
    theirs = space_timesteps(total, [int(c) for c in spec.split(",")])
    tau = timesteps.sections(schedules.linear(total), spec)
    np.testing.assert_array_equal(tau, [*(t + 1 for t in reversed(theirs)), 0])
    np.testing.assert_array_equal(timesteps.sections(schedules.linear(total), [int(c) for c in spec.split(",")]), tau)


def test_a_last_section_of_one_step_takes_the_top():
    assert timesteps.sections(LINEAR, "5,1")[0] == T
    np.testing.assert_array_equal(timesteps.sections(LINEAR, "1"), [T, 0])


@pytest.mark.parametrize("count", [2, 25, 50, 100, 200, 1000])
def test_a_ddim_string_is_the_whole_stride_with_exactly_that_count(count):
    theirs = next(range(0, T, i) for i in range(1, T) if len(range(0, T, i)) == count)
    np.testing.assert_array_equal(timesteps.sections(LINEAR, f"ddim{count}"), [*(t + 1 for t in reversed(theirs)), 0])


def test_a_ddim_string_is_refused_where_the_authors_refuse_it():
    possible = {len(range(0, T, i)) for i in range(1, T)}
    for count in sorted(set(range(1, T + 2)) - possible, reverse=True):
        with refused(f"ddim{count}"):
            timesteps.sections(LINEAR, f"ddim{count}")


@pytest.mark.parametrize("spec", ["", "ddim", "ddimx", "ddim0", "10,,5", "0,5", "-3", "2.5", "501,1", "1001", "a,b"])
def test_a_section_string_that_says_nothing_possible_is_refused(spec):
    with refused("tau"):
        timesteps.sections(LINEAR, spec)


@pytest.mark.parametrize("spec", [[], [2.5]], ids=str)
def test_a_section_list_that_holds_no_counts_is_refused(spec):
    with refused("tau"):
        timesteps.sections(LINEAR, spec)


def test_explicit_times_stand_as_given_with_or_without_the_final_zero():
    np.testing.assert_array_equal(timesteps.explicit(LINEAR, [1000, 500, 250]), [1000, 500, 250, 0])
    np.testing.assert_array_equal(timesteps.explicit(LINEAR, (999, 1, 0)), [999, 1, 0])
    assert timesteps.explicit(LINEAR, [10.0, 5.0]).dtype == np.int64
    np.testing.assert_array_equal(timesteps.explicit(LINEAR, [10.5, 0.25]), [10.5, 0.25, 0])


@pytest.mark.parametrize(
    "seq",
    [[], [0], [5, 5], [5, 10], [5, 0, 0], [T + 1, 5], [5, -1], [-5], [np.nan, 5], [5, np.nan], [np.inf, 5], [[5, 3]]],
    ids=str,
)
def test_explicit_times_that_do_not_descend_in_range_are_refused(seq):
    with refused("tau"):
        timesteps.explicit(LINEAR, seq)


@pytest.mark.parametrize("seq", ["10,5", ["a"], None], ids=str)
def test_explicit_times_that_are_no_numbers_are_refused(seq):
    with refused("tau"):
        timesteps.explicit(LINEAR, seq)


@pytest.mark.parametrize(
    "tau", [[5], [0], 5, [5, 3], [5, 5, 0], [3, 5, 0], [T + 1, 0], [5, np.nan, 0], [[5, 0]]], ids=str
)
def test_check_refuses_what_is_no_grid(tau):
    with refused("tau"):
        timesteps.check(LINEAR, tau)


@pytest.mark.parametrize("name", timesteps.GRIDS)
@pytest.mark.parametrize("start", [0.3, 0.985])
def test_a_start_below_1_multiplies_every_time_of_a_grid(name, start):
    schedule = schedules.cosine()
    whole = timesteps.GRIDS[name](schedule, 7)
    np.testing.assert_allclose(timesteps.GRIDS[name](schedule, 7, start=start), start * whole, rtol=1e-15)
    assert np.array_equal(timesteps.GRIDS[name](schedule, 7, start=1.0), whole)


@pytest.mark.parametrize("start", [0, -0.1, 1.5, np.nan])
def test_a_start_outside_0_to_1_is_refused(start):
    with pytest.raises(InputError, match="start of tau is"):
        timesteps.uniform(schedules.cosine(), 7, start=start)


# Grids by noise level that other libraries have


@pytest.mark.parametrize("steps", [2, 7, 25])
def test_polyexponential_is_k_diffusions_ramp_in_log_sigma(steps):
    low, high = (np.exp(-LINEAR.half_log_snr(t)) for t in (1, T))
    for rho in (0.5, 1.0, 2.0):
        ramp = np.linspace(1, 0, steps) ** rho
        wanted = np.exp(ramp * (np.log(high) - np.log(low)) + np.log(low))
        tau = timesteps.polyexponential(LINEAR, steps, rho)
        np.testing.assert_allclose(np.exp(-LINEAR.half_log_snr(tau[:-1])), wanted, rtol=1e-10)
    np.testing.assert_allclose(timesteps.polyexponential(LINEAR, steps), timesteps.log_snr(LINEAR, steps), atol=1e-9)


def test_kl_optimal_is_even_in_the_angle_whose_tangent_is_sigma():
    tau = timesteps.kl_optimal(LINEAR, 9)
    angles = np.arctan(np.exp(-LINEAR.half_log_snr(tau[:-1])))
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / 8, rtol=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (2.0, 1.0), (0.5, 0.7)])
def test_beta_takes_quantiles_of_the_distribution(alpha, beta):
    tau = timesteps.beta(LINEAR, 8, alpha, beta)
    shares = stats.beta.cdf((tau[:-1] - 1) / (T - 1), alpha, beta)
    np.testing.assert_allclose(shares, 1 - np.arange(8) / 8, atol=1e-12)
    tau = timesteps.beta(LINEAR, 8, alpha, beta, of="sigma")
    sigma = np.exp(-LINEAR.half_log_snr(tau[:-1]))
    shares = stats.beta.cdf((sigma - sigma[-1]) / (sigma[0] - sigma[-1]), alpha, beta)
    np.testing.assert_allclose(shares, np.linspace(1, 0, 8), atol=1e-9)


def test_shifted_times_are_those_of_the_formula():
    flow = schedules.rectified_flow(1000)
    u = np.linspace(1, 1 / 6, 6)
    for given, k in (({}, 3.0), ({"shift": 1.5}, 1.5), ({"mu": 1.15}, np.exp(1.15)), ({"tokens": 4096}, np.exp(1.15))):
        tau = timesteps.shifted(flow, 6, **given)
        np.testing.assert_allclose(tau[:-1] / 1000, k * u / (1 + (k - 1) * u), rtol=1e-13)
    np.testing.assert_allclose(timesteps.shifted(flow, 6, shift=1.0), timesteps.uniform(flow, 6), atol=0.5)
    np.testing.assert_array_equal(timesteps.shifted(flow, 6, tokens=256), timesteps.shifted(flow, 6, mu=0.5))
    # What is shifted by k is k times as noisy in units of the signal: log-SNR moves by a constant.
    moved = flow.half_log_snr(timesteps.shifted(flow, 6)[1:-1]) - flow.half_log_snr(1000 * u[1:])
    np.testing.assert_allclose(moved, -np.log(3), rtol=1e-12)
    stretched = timesteps.shifted(flow, 6, terminal=0.1)
    np.testing.assert_allclose(stretched[[0, -2]], [1000, 100], rtol=1e-13)
    ratios = (1000 - stretched[1:-1]) / (1000 - timesteps.shifted(flow, 6)[1:-1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)


def test_align_your_steps_takes_the_published_levels_and_interpolates_their_logarithms():
    schedule = schedules.scaled_linear()
    for model in ("sd15", "sdxl"):
        tau = timesteps.ays(schedule, 10, model)
        sigma = np.exp(-schedule.half_log_snr(tau[:-1]))
        np.testing.assert_allclose(sigma, noise.AYS[model][:-1], rtol=1e-4)  # the first is the schedule's own, 14.6146
        twice = np.log(np.exp(-schedule.half_log_snr(timesteps.ays(schedule, 20, model)[:-1])))
        np.testing.assert_allclose(twice[1::2][:-1], (twice[:-2:2] + twice[2::2]) / 2, atol=1e-4)
    with refused("deepfloyd begins at noise / signal 160.41, and this schedule at 14.615"):
        timesteps.ays(schedule, 10, "deepfloyd")


def test_linspace_without_rounding_is_even():
    np.testing.assert_allclose(timesteps.linspace(LINEAR, 7, rounded=False)[:-1], np.linspace(T, 1, 7), rtol=1e-15)
    np.testing.assert_allclose(
        timesteps.linspace(LINEAR, 7, last=False, rounded=False)[:-1], np.linspace(T, 1, 8)[:-1], rtol=1e-15
    )


def test_sections_start_below_t_where_asked():
    np.testing.assert_allclose(
        timesteps.sections(LINEAR, "2,3", start=0.9), 0.9 * timesteps.sections(LINEAR, "2,3"), rtol=1e-15
    )


def test_wrong_options_of_these_grids_are_refused():
    for text, build, options in (
        ("rho is 0", timesteps.polyexponential, {"rho": 0.0}),
        ("alpha is -1", timesteps.beta, {"alpha": -1.0}),
        ("of is 'rho'.*sigma", timesteps.beta, {"of": "rho"}),
        ("shift=2.0 and mu=1.0.*one of them", timesteps.shifted, {"shift": 2.0, "mu": 1.0}),
        ("shift=-2", timesteps.shifted, {"shift": -2.0}),
        ("terminal is 1", timesteps.shifted, {"terminal": 1.0}),
        ("model is 'sd3'.*sd15", timesteps.ays, {"model": "sd3"}),
    ):
        with refused(text):
            build(LINEAR, 10, **options)
