"""Laws of the derivatives of tables with respect to their grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gaussian_denoiser, ideal_network

import diffusion
from diffusion import schedules, solvers

SCHEDULE = schedules.linear()
KEY = jax.random.key(3)
TAU = np.array([950.3, 600.4, 300.6, 80.7, 0.0])


@pytest.fixture
def float64():
    """Double precision in all threads: the callback that builds tables runs in another one."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (solvers.ddim, {"eta": 0.0}),
        (solvers.ddim, {"eta": 0.7}),
        (solvers.dpm_solver_pp, {"order": 2}),
        (solvers.unipc, {"order": 3}),
        (solvers.heun, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_flow_through_the_whole_scan_to_tau(float64, solver, options):
    network = ideal_network(SCHEDULE, lambda x, a, n: gaussian_denoiser(jnp.tanh(x), a, n, 0.2, 0.3))
    x_init = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))

    def loss_of(table):
        out = diffusion.sample(network, {}, table, KEY, 2, (3,), prediction="x0", x_init=x_init)
        return jnp.sum(out**2)

    traced = solvers.differentiable(solver, SCHEDULE, 4, **options)
    value, gradient = jax.jit(jax.value_and_grad(lambda tau: loss_of(traced(tau))))(TAU)
    assert float(value) == pytest.approx(float(loss_of(solver(SCHEDULE, TAU, **options))), rel=1e-12)
    for i in range(4):
        step = np.zeros(5)
        step[i] = 1e-2
        difference = loss_of(solver(SCHEDULE, TAU + step, **options)) - loss_of(solver(SCHEDULE, TAU - step, **options))
        assert float(gradient[i]) == pytest.approx(float(difference) / 2e-2, rel=1e-3)
    assert gradient[-1] == 0


def test_a_learned_grid_beats_the_one_it_starts_from():
    """Gradient descent on tau brings DDIM's variance on Gaussian data nearer to the truth."""
    variance, rate = 0.02, 3e6
    network = ideal_network(SCHEDULE, lambda x, a, n: gaussian_denoiser(x, a, n, 0.0, variance))
    x_init = jnp.ones((1, 1))
    traced = solvers.differentiable(solvers.ddim, SCHEDULE, 4)

    @jax.jit
    @jax.value_and_grad
    def error(tau):
        out = diffusion.sample(network, {}, traced(tau), KEY, 1, (1,), prediction="x0", x_init=x_init)
        return (out[0, 0] - variance**0.5) ** 2

    tau, errors = jnp.asarray([1000.0, 750.0, 500.0, 250.0, 0.0]), []
    for _ in range(30):
        value, gradient = error(tau)
        errors.append(float(value))
        step = jnp.clip(rate * gradient, -20, 20).at[0].set(0.0)
        tau = tau - step
    assert errors[-1] < 0.5 * errors[0]
