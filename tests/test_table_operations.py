"""Laws of what can be done with a table: JSON, reversal, and the exact moments of Gaussian data."""

import json

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
    with refused("log_variance, name, noise, signal, t, tau, update"):
        from_json(json.dumps({k: v for k, v in GOOD.items() if k != "noise"}))
    with refused("and no other"):
        from_json(json.dumps(GOOD | {"sigma": [1, 2]}))


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
