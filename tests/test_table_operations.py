"""Laws of what can be done with a table: JSON, reversal, and the exact moments of Gaussian data."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gaussian_denoiser, mixture_denoiser, refused
from trajectories import run_table

import diffusion
from diffusion import schedules, solvers, timesteps
from diffusion.solvers import SOLVERS, ddim, ddpm, from_json, gaussian_moments, make_table, unipc
from diffusion.solvers.table import to_json

LINEAR = schedules.linear()
EDM = schedules.edm()
ZERO_SNR = schedules.zero_terminal_snr(LINEAR)
FLOW = schedules.rectified_flow()
TAU = timesteps.log_snr(LINEAR, 5)


def every_table():
    """One of each solver on a grid of real times, and tables of other kinds."""
    tables = [solver(LINEAR, TAU) for name, solver in SOLVERS.items() if name != "analytic_dpm"]
    tables += [
        solvers.analytic_dpm(LINEAR, TAU, np.linspace(0.9, 0.1, 5)),
        ddpm(LINEAR, TAU, "learned"),
        ddim(LINEAR, TAU).reverse(3),
        ddim(FLOW, timesteps.uniform(FLOW, 7), 1 / 3),
        random_table(3, 6, 0),
    ]
    return tables


def random_table(registers, stages, seed):
    rng = np.random.default_rng(seed)
    angle, tau = rng.uniform(0.1, 1.5, stages), np.arange(stages, -1, -1)
    update = rng.normal(0, 0.5, (stages, registers, registers + 2))
    return make_table(f"random{registers}", tau, tau[:-1], np.cos(angle), 1.4 * np.sin(angle), update)


tables = pytest.mark.parametrize("table", every_table(), ids=lambda t: t.name)
fixed_noise = pytest.mark.parametrize(
    "table", [table for table in every_table() if table.log_variance is None], ids=lambda t: t.name
)


# JSON


@tables
def test_json_keeps_every_number_to_the_last_bit(table):
    text = to_json(table)
    assert text == table.to_json()
    back = from_json(text)
    assert back.name == table.name
    assert (back.log_variance is None) == (table.log_variance is None)
    assert jax.tree.structure(back) == jax.tree.structure(table)
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(table), strict=True):
        assert got.dtype == np.float64
        assert got.shape == np.shape(wanted)
        assert got.tobytes() == np.asarray(wanted, np.float64).tobytes()


def test_json_is_plain_and_names_the_fields():
    fields = json.loads(ddim(LINEAR, [500, 0]).to_json())
    assert fields["tau"] == [500, 0]
    assert fields["update"] == [[[0, 1, 0]]]
    assert fields["name"] == "ddim(eta=0)"


GOOD = json.loads(ddim(LINEAR, [500, 100, 0]).to_json())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}"])
def test_text_that_is_no_table_is_refused_in_one_line(text):
    with refused("no sampler table"):
        from_json(text)


def test_a_field_too_few_or_too_many_is_refused():
    with refused("facts, log_variance, name, noise, signal, t, tau, update, version"):
        from_json(json.dumps({k: v for k, v in GOOD.items() if k != "noise"}))
    with refused("and no other"):
        from_json(json.dumps(GOOD | {"sigma": [1, 2]}))


def test_the_form_of_earlier_versions_is_read_and_facts_come_back():
    earlier = {name: value for name, value in GOOD.items() if name not in ("version", "facts")}
    assert from_json(json.dumps(earlier)).to_json() == json.dumps(GOOD)
    facts = {"prediction": "v", "shape": [8, 8, 1]}
    assert from_json(json.dumps(GOOD | {"facts": facts})).facts == facts


@pytest.mark.parametrize(
    "change",
    [
        {"signal": [0.5, "much"]},
        {"signal": [0.5, np.nan]},
        {"signal": [0.5, np.inf]},
        {"signal": [0.5, None]},
        {"signal": None},
        {"signal": [0.5]},
        {"signal": [[0.5, 0.9]]},
        {"t": [500, 100, 0]},
        {"tau": None},
        {"tau": []},
        {"tau": 500},
        {"tau": [10**400, 100, 0]},
        {"update": [[1, 2, 3]]},
        {"update": [[[1, 2]], [[1, 2]]]},
        {"update": [[[1, 2, 3], [1, 2]]]},
        {"update": []},
        {"update": {}},
        {"log_variance": [0.0, 1.0]},
        {"log_variance": [[0.0, 1.0]]},
        {"name": 5},
        {"facts": []},
        {"facts": None},
        {"version": 3},
        {"version": "2"},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_wrong_field_is_refused_in_one_line(change):
    with refused():
        from_json(json.dumps(GOOD | change))


# Reversal


def smooth(x, a, n):
    """The denoiser of a network eps = tanh(x / 2) / 2, of small slope."""
    return (x - n * np.tanh(x / 2) / 2) / a


def there_and_back(table, iterations, x_0, denoiser):
    x_top = run_table(table.reverse(iterations), x_0, denoiser)
    return run_table(table, x_top, denoiser)


START = np.linspace(-1.5, 1.5, 13)


def test_many_iterations_invert_ddim_and_each_brings_it_closer():
    for schedule in (LINEAR, EDM, schedules.cosine()):
        table = ddim(schedule, timesteps.uniform(schedule, 20))
        errors = [np.max(np.abs(there_and_back(table, k, START, smooth) - START)) for k in (1, 2, 4, 8, 60)]
        assert errors[0] > 1e-4
        assert np.all(np.diff(errors[:4]) < 0)
        assert errors[-1] < 1e-6


def test_the_error_of_one_iteration_falls_as_one_over_the_steps():
    steps = np.array([40, 80, 160, 320])
    for denoiser in (smooth, mixture_denoiser):
        tables = [ddim(LINEAR, timesteps.log_snr(LINEAR, s)) for s in steps]
        # From t = 1 up, as the estimate of the last step forgets where in x_1 it came from.
        start = [run_table(t, np.linspace(-2, 2, 13), denoiser) for t in tables]
        errors = [
            np.sqrt(np.mean((there_and_back(t, 1, x, denoiser) - x) ** 2)) for t, x in zip(tables, start, strict=True)
        ]
        assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - 1) < 0.2


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
def test_reversal_is_fixed_point_iteration_and_on_gaussian_data_a_geometric_sum(schedule, iterations):
    """x_t = g x_s + q x_t, from x_t = x_s: after m iterations x_t = g (1 + q + ... + q^(m-1)) x_s + q^m x_s."""
    variance, tau = 0.3, timesteps.uniform(schedule, 6)
    a, n = schedule.at(tau)
    factor = 1.0
    for i in range(5, -1, -1):
        eps_slope = n[i] / (a[i] ** 2 * variance + n[i] ** 2)  # E[eps | x_t] = slope * x_t for mean 0
        grow = a[i] / a[i + 1]
        q = (n[i] - grow * n[i + 1]) * eps_slope
        factor *= grow * np.sum(q ** np.arange(iterations)) + q**iterations
    reverse = ddim(schedule, tau).reverse(iterations)
    got = run_table(reverse, START, lambda x, a, n: gaussian_denoiser(x, a, n, 0.0, variance))
    np.testing.assert_allclose(got, factor * START, rtol=1e-10)
    moments = gaussian_moments(reverse, 0.0, variance, (0.5, 2.0))
    np.testing.assert_allclose(moments, (0.5 * factor, 2 * factor**2), rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_the_scan_reverses_and_samples_back_to_the_images():
    def eps_network(params, x, t, cond=None):
        return jnp.tanh(x / 2) / 2 * (0.5 + t.reshape(-1, 1, 1) / 2000)

    table, key = ddim(LINEAR, timesteps.uniform(LINEAR, 10)), jax.random.key(0)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 4, 2))
    noise = diffusion.sample(eps_network, {}, table.reverse(60), key, 3, (4, 2), x_init=images)
    back = diffusion.sample(eps_network, {}, table, key, 3, (4, 2), x_init=noise)
    assert np.max(np.abs(noise - images)) > 0.1
    np.testing.assert_allclose(back, images, rtol=0, atol=1e-6)


def test_a_reversed_table_climbs_the_grid_with_its_iterations_as_calls_at_the_upper_time():
    table = ddim(LINEAR, TAU)
    reverse = solvers.reverse(table, 3)
    np.testing.assert_array_equal(reverse.tau, TAU[::-1])
    np.testing.assert_array_equal(reverse.t, np.repeat(TAU[:-1][::-1], 3))
    assert reverse.nfe == 15
    for got, wanted in zip((reverse.signal, reverse.noise), LINEAR.at(reverse.t), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-14)
    assert not reverse.update[..., -1].any()  # no fresh noise


@pytest.mark.parametrize(
    "build",
    [
        lambda: ddpm(LINEAR, TAU),
        lambda: ddim(LINEAR, TAU, 0.1),
        lambda: ddpm(LINEAR, TAU, "learned"),
        lambda: solvers.consistency(LINEAR, TAU),
        lambda: unipc(LINEAR, TAU),
        lambda: solvers.heun(LINEAR, TAU),
        lambda: solvers.dpm_solver_pp(LINEAR, TAU),
        lambda: ddim(ZERO_SNR, timesteps.uniform(ZERO_SNR, 5)),
        lambda: ddim(FLOW, timesteps.uniform(FLOW, 5)),
        lambda: ddim(LINEAR, TAU).reverse(),
    ],
)
def test_only_deterministic_ddim_from_some_signal_can_be_reversed(build):
    with refused("reverse"):
        build().reverse(2)


@pytest.mark.parametrize("iterations", [0, -1, 1.5, np.nan])
def test_a_number_of_iterations_below_one_or_not_whole_is_refused(iterations):
    with refused("iterations"):
        ddim(LINEAR, TAU).reverse(iterations)


def test_a_reversed_table_is_not_run_from_noise():
    with refused("x_init"):
        diffusion.sample(lambda p, x, t, c: x, {}, ddim(LINEAR, TAU).reverse(), jax.random.key(0), 2, (3,))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("rule", "options"),
    [("present", {"guidance_scale": 2.0}), ("new", {"guidance_scale": 0.6, "guidance_rule": "cfg++"})],
    ids=["cfg", "cfg++"],
)
def test_iterations_invert_guided_ddim_whichever_eps_goes_on(options, rule):
    def network(params, x, t, cond):
        return jnp.tanh(x / 3 + cond[:, None] / 4) / 3

    table = ddim(LINEAR, timesteps.uniform(LINEAR, 10))
    shared = {"cond": jnp.ones(3), "null_cond": jnp.zeros(3), **options}
    draw = partial(diffusion.sample, network, {}, key=jax.random.key(0), num_samples=3, sample_shape=(7,), **shared)
    images = jnp.asarray(np.random.default_rng(0).normal(0, 0.5, (3, 7)))
    errors = [np.abs(draw(table, x_init=draw(table.reverse(k, rule), x_init=images)) - images).max() for k in (1, 60)]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-7


@pytest.mark.usefixtures("float64")
def test_one_call_of_inversion_under_cfg_plus_plus_is_the_formula():
    """x_t = (a_t / a_s) (x_s - n_s eps_u) + n_t eps_g, each eps asked for at x_s and t."""

    def network(params, x, t, cond):
        return jnp.tanh(x / 3 + cond[:, None] / 4) / 3

    x, w = np.random.default_rng(0).normal(size=(2, 3)), 0.6
    a, n = LINEAR.at(TAU[::-1])
    wanted = x
    for i in range(5):
        eps_u, eps_c = (np.tanh(wanted / 3 + c / 4) / 3 for c in (0, 1))
        eps_g = eps_u + w * (eps_c - eps_u)
        wanted = a[i + 1] / a[i] * (wanted - n[i] * eps_u) + n[i + 1] * eps_g
    shared = {"cond": jnp.ones(2), "null_cond": jnp.zeros(2), "guidance_scale": w, "guidance_rule": "cfg++"}
    table = ddim(LINEAR, TAU).reverse()
    got = diffusion.sample(network, {}, table, jax.random.key(0), 2, (3,), x_init=jnp.asarray(x), **shared)
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_inversion_of_kept_eps_has_the_true_noise_as_its_fixed_point():
    """One step of DDIM with clip keep_eps, undone by an iteration that begins at the answer."""
    a, n = LINEAR.at([300, 100])
    x_t = np.linspace(-3, 3, 13)
    eps = np.tanh(x_t / 3) / 3
    clipped = np.clip((x_t - n[0] * eps) / a[0], -1, 1)
    x_s = a[1] * clipped + n[1] * eps
    assert np.abs(clipped).max() == 1
    # The rows of the second iteration in the step from 100 to 300.
    update = ddim(LINEAR, [300, 100, 0]).reverse(2).update[3]
    seen = a[0] * clipped + n[0] * eps  # what the scan puts in the place of x
    got = update @ np.stack([seen, x_t, x_s, clipped, 0 * x_t])
    np.testing.assert_allclose(got[0], x_t, rtol=1e-12)


def test_the_present_rule_asks_where_x_is_and_at_first_at_the_lowest_time():
    reverse = ddim(LINEAR, TAU).reverse(2, rule="present")
    up = TAU[:-1][::-1]
    np.testing.assert_array_equal(reverse.t[1::2], up)
    np.testing.assert_array_equal(reverse.t[0::2], [up[0], *up[:-1]])


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
def test_the_present_rule_is_eulers_step_of_the_flow_as_ddim_encodes(schedule):
    """x_t / a_t = x_s / a_s + (rho_t - rho_s) eps(x_s, s) from the second step on (arXiv:2010.02502, Eq. 13)."""
    tau = timesteps.uniform(schedule, 6)
    reverse = ddim(schedule, tau).reverse(rule="present")
    a, n = schedule.at(tau[::-1])
    x = run_table(reverse, START, smooth, stages=1)
    for i in range(1, 6):
        eps = np.tanh(x / 2) / 2
        wanted = a[i + 1] * (x / a[i] + (n[i + 1] / a[i + 1] - n[i] / a[i]) * eps)
        x = run_table(reverse, START, smooth, stages=i + 1)
        np.testing.assert_allclose(x, wanted, rtol=1e-9)


def test_an_unknown_rule_of_reversal_is_refused():
    with refused("present"):
        ddim(LINEAR, TAU).reverse(1, "presnt")


# Resampling


@pytest.mark.parametrize("schedule", [LINEAR, EDM, FLOW], ids=["linear", "edm", "flow"])
def test_resampling_keeps_the_distribution_of_a_sampler_of_optimal_variance(schedule):
    """On Gaussian data such a step is exact, and so is the forward step after it."""
    variance, tau = 0.3, timesteps.explicit(schedule, np.linspace(0.9, 0, 8)[:-1] * schedule.num_timesteps)
    a, n = schedule.at(tau[:-1])
    gamma = n**2 / (a**2 * variance + n**2)
    table = solvers.analytic_dpm(schedule, tau, gamma, eta=0.5)
    # The last step of a sampler injects no noise; here it does, to be as exact as the others.
    table.update[-1, 0, 2] = (variance * gamma[-1]) ** 0.5
    start = (a[0] * 0.7, a[0] ** 2 * variance + n[0] ** 2)
    wanted = gaussian_moments(table, 0.7, variance, start)
    for repeats in (1, 2, 7):
        again = solvers.resampled(table, repeats)
        assert again.nfe == repeats * table.nfe
        np.testing.assert_array_equal(again.t, np.repeat(table.t, repeats))
        np.testing.assert_allclose(gaussian_moments(again, 0.7, variance, start), wanted, rtol=1e-9)
    np.testing.assert_array_equal(solvers.resampled(table, 1).update, table.update)


def test_resampling_brings_inpainting_near_the_conditional_mean_of_a_correlated_pair():
    """The law of the unknown half of a Gaussian pair given the known one is N(rho x, v (1 - rho^2))."""
    rho, variance, known = 0.9, 0.25, 1.0
    values, axes = np.linalg.eigh(variance * np.array([[1, rho], [rho, 1]]))

    def network(params, x, t, cond):
        signal_power = jnp.interp(t, jnp.arange(1001.0), jnp.asarray(LINEAR.alpha_bar, jnp.float32))[:, None]
        shrunk = jnp.sqrt(signal_power) * values[None] / (signal_power * values[None] + 1 - signal_power) * (x @ axes)
        return shrunk @ axes.T

    table = ddim(LINEAR, timesteps.uniform(LINEAR, 100), eta=1.0)
    given = (np.array([known, 0.0]), np.array([1.0, 0.0]))
    shares, spreads = [], []
    for repeats in (1, 2, 10):
        again = solvers.resampled(table, repeats)
        key = jax.random.key(0)
        x = diffusion.sample(network, {}, again, key, 4096, (2,), prediction="x0", known=given)
        np.testing.assert_allclose(x[:, 0], known, atol=1e-6)
        shares.append(float(x[:, 1].mean()) / (rho * known))
        spreads.append(float(x[:, 1].std()) / (variance * (1 - rho**2)) ** 0.5)
    assert 0.6 < shares[0] < 0.7
    assert 0.78 < shares[1] < 0.88
    assert shares[2] > 0.95
    # What docs/sampling.md says of the spread: too wide without repeats, too narrow with many.
    assert spreads[0] > 1.2
    assert 0.7 < spreads[2] < 0.9


@pytest.mark.parametrize(
    "build",
    [
        lambda: unipc(LINEAR, TAU),
        lambda: ddpm(LINEAR, TAU, "learned"),
        lambda: ddim(LINEAR, TAU).reverse(),
        lambda: solvers.heun(LINEAR, TAU),
    ],
)
def test_only_tables_that_remember_nothing_are_resampled(build):
    with refused("resampled"):
        solvers.resampled(build(), 3)


@pytest.mark.parametrize("repeats", [0, 1.5, np.nan, True])
def test_a_number_of_repeats_below_one_or_not_whole_is_refused(repeats):
    with refused("repeats"):
        solvers.resampled(ddim(LINEAR, TAU), repeats)


# Moments of Gaussian data


def matrix(d, seed=0):
    """A covariance with no structure."""
    root = np.random.default_rng(seed).normal(0, 0.6, (d, d))
    return root @ root.T + 0.05 * np.eye(d)


def propagated(table, mean, covariance, start_mean, start_covariance):
    """Mean and covariance of all registers stacked, as one linear system in R d dimensions."""
    d, registers, eye = mean.size, table.num_registers, np.eye(mean.size)
    first = np.zeros(registers * d)
    second = np.zeros((registers * d, registers * d))
    first[:d], second[:d, :d] = start_mean, start_covariance
    for a, n, update in zip(table.signal, table.noise, table.update, strict=True):
        gain = a * covariance @ np.linalg.inv(a**2 * covariance + n**2 * eye)
        select = np.eye(registers * d)[:d]
        system = np.kron(update[:, :-2], eye) + np.kron(update[:, [-2]], gain @ select)
        offset = np.kron(update[:, -2], mean - gain @ (a * mean))
        first = system @ first + offset
        second = system @ second @ system.T + np.kron(np.outer(update[:, -1], update[:, -1]), eye)
    return first[:d], second[:d, :d]


@fixed_noise
def test_moments_of_a_covariance_matrix_are_those_of_the_full_linear_system(table):
    d = 4
    mean, covariance = np.array([0.5, -1.0, 0.0, 2.0]), matrix(4)
    power = table.signal[0] ** 2 + table.noise[0] ** 2
    for start, given in (((np.zeros(d), power * np.eye(d)), None), ((np.full(d, 0.3), 0.7 * np.eye(d)), (0.3, 0.7))):
        if given is None and table.tau[0] < table.tau[-1]:
            with refused("starts from images"):
                gaussian_moments(table, mean, covariance)
            continue
        wanted = propagated(table, mean, covariance, *start)
        got = gaussian_moments(table, mean, covariance, given)
        # The axes of the covariance see 0.3 in every coordinate of their own, not of ours.
        if given is not None:
            axes = np.linalg.eigh(covariance)[1]
            wanted = propagated(table, mean, covariance, axes @ start[0], start[1])
        for one, other in zip(got, wanted, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9 * np.max(np.abs(other)))


@fixed_noise
def test_moments_of_numbers_are_those_of_the_one_by_one_matrix(table):
    for start in (None, (0.4, 1.7))[int(table.tau[0] < table.tau[-1]) :]:
        number = gaussian_moments(table, 0.3, 0.6, start)
        assert all(isinstance(value, float) for value in number)
        mean, covariance = gaussian_moments(table, np.array([0.3]), np.array([[0.6]]), start)
        assert (mean.shape, covariance.shape) == ((1,), (1, 1))
        np.testing.assert_allclose((mean[0], covariance[0, 0]), number, rtol=1e-12)


def test_a_start_along_the_principal_axes_is_taken_axis_by_axis():
    table, variances = ddim(LINEAR, TAU, 0.5), np.array([0.1, 0.4, 0.9])
    start = (np.array([0.3, -0.2, 1.0]), np.array([1.2, 0.8, 0.0]))
    mean, covariance = gaussian_moments(table, np.array([1.0, 2.0, 3.0]), np.diag(variances), start)
    for i in range(3):
        alone = gaussian_moments(table, float(i + 1), variances[i], (start[0][i], start[1][i]))
        np.testing.assert_allclose((mean[i], covariance[i, i]), alone, rtol=1e-12)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), rtol=0, atol=1e-14)


def test_a_start_from_the_true_marginal_keeps_the_true_mean():
    table = ddim(EDM, timesteps.uniform(EDM, 7), 1.0)
    a, n = table.signal[0], table.noise[0]
    mean, _ = gaussian_moments(table, 0.8, 0.25, (0.8 * a, 0.25 * a**2 + n**2))
    np.testing.assert_allclose(mean, 0.8, rtol=1e-12)
    assert abs(gaussian_moments(table, 0.8, 0.25)[0] - 0.8) > 1e-5  # sample's own start lacks the mean


def test_one_mean_for_all_coordinates_serves_a_covariance_matrix():
    table, covariance = ddim(LINEAR, TAU, 0.5), matrix(3)
    got, wanted = (gaussian_moments(table, mean, covariance) for mean in (0.4, np.full(3, 0.4)))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_one_variance_for_all_coordinates_serves_a_vector_of_means():
    table, means = ddim(LINEAR, TAU, 0.5), np.array([0.4, -1.0])
    mean, variance = gaussian_moments(table, means, 0.3)
    for i in range(2):
        np.testing.assert_allclose((mean[i], variance), gaussian_moments(table, means[i], 0.3), rtol=1e-12)


def test_moments_where_the_noise_depends_on_a_network_are_refused():
    with refused("variance"):
        gaussian_moments(ddpm(LINEAR, TAU, "learned"), 0.0, 1.0)
