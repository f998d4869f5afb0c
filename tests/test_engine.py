"""Laws of the one scan that hold for every table: compilations, what is compiled, memory, gradients, calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import diffusion
from diffusion import sampling, schedules, solvers, timesteps
from diffusion.solvers import SOLVERS, ddim, ddpm, make_table

T = 50
LINEAR = schedules.linear(T, 1e-3, 0.2)
GRIDS = (timesteps.uniform, timesteps.quadratic, timesteps.log_snr, timesteps.karras)
NAMES = [name for name in SOLVERS if name != "analytic_dpm"]


def key(seed=0):
    return jax.random.key(seed)


def build(name, steps):
    tau = timesteps.uniform(LINEAR, steps)
    if name == "analytic_dpm":
        return solvers.analytic_dpm(LINEAR, tau, np.linspace(0.9, 0.1, steps))
    return SOLVERS[name](LINEAR, tau)


def elementwise(params, x, t, cond=None):
    return 0.7 * jnp.tanh(x) * (t.reshape((-1,) + (1,) * (x.ndim - 1)) / T + 0.2)


# Compilations


def test_one_compilation_serves_all_multistep_solvers_of_a_shape():
    traces = []

    def network(params, x, t, cond=None):
        traces.append(x.shape)
        return elementwise(params, x, t)

    tables = []
    for grid in GRIDS:
        tau = grid(LINEAR, 6)
        tables += [solvers.dpm_solver_pp(LINEAR, tau, 3, g, v) for g in (0.0, 0.5, 1.0) for v in ("exact", "official")]
        tables += [solvers.unipc(LINEAR, tau, 2, v) for v in ("exact", "bh1", "bh2")]
        tables += [solvers.deis(LINEAR, tau, 3, basis) for basis in ("lambda", "rho", "t")]
        tables += [solvers.lms(LINEAR, tau, 3), solvers.ipndm(LINEAR, tau, 3)]
    assert len({table.name for table in tables}) >= 12
    assert {table.update.shape for table in tables} == {(6, 3, 5)}
    before = sampling._run._cache_size()
    samples = np.array([diffusion.sample(network, {}, table, key(), 2, (3,)) for table in tables])
    assert sampling._run._cache_size() == before + 1
    assert set(traces) == {(2, 3)}
    traced = len(traces)
    assert len(np.unique(samples[:, 0, 0])) > len(tables) // 2  # they are not one and the same sampler
    diffusion.sample(network, {}, solvers.dpm_solver_pp(LINEAR, timesteps.uniform(LINEAR, 6), 2), key(), 2, (3,))
    assert len(traces) == 2 * traced  # and the count does see another shape


def test_one_compilation_serves_all_one_step_solvers_etas_and_grids():
    traces = []

    def network(params, x, t, cond=None):
        traces.append(x.shape)
        return elementwise(params, x, t)

    run = jax.jit(lambda table, k: diffusion.sample(network, {}, table, k, 2, (3,)))
    run(ddim(LINEAR, timesteps.linspace(LINEAR, 4)), key())
    traced = len(traces)
    for count, grid in enumerate(GRIDS):
        tau = grid(LINEAR, 4)
        tables = [ddim(LINEAR, tau, eta) for eta in (0.0, 0.2, 1.0)]
        tables += [SOLVERS[name](LINEAR, tau) for name in ("ddpm", "sigma_hat", "euler_ancestral", "consistency")]
        tables += [solvers.dpm_solver_pp(LINEAR, tau, 1), solvers.analytic_dpm(LINEAR, tau, np.full(4, 0.5))]
        for table in tables:
            run(table, key(count))
    assert len(traces) == traced


# What is compiled


def equations(jaxpr, inside=()):
    """All equations of a jaxpr and of those within, each with the names of the primitives around it."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, (*inside, equation.primitive.name))


def traced_sampling(table, **options):
    def run(table, k):
        return diffusion.sample(elementwise, {}, table, k, 3, (4, 2), **options)

    return jax.make_jaxpr(run)(table, key()).jaxpr


CASES = {
    "deterministic": (lambda: ddim(LINEAR, timesteps.uniform(LINEAR, 7)), {}),
    "stochastic": (lambda: ddim(LINEAR, timesteps.uniform(LINEAR, 7), 1.0), {"clip": "recompute"}),
    "multistep": (lambda: solvers.unipc(LINEAR, timesteps.uniform(LINEAR, 7)), {"return_trajectory": True}),
    "guided": (
        lambda: solvers.edm(LINEAR, [T - 5, 20, 5, 0], s_churn=0.5),
        {
            "cond": np.zeros(3),
            "null_cond": np.zeros(3),
            "guidance_scale": 2.0,
            "guidance_interval": (5, 20),
            "dynamic_threshold": 0.9,
            "known": (0.0, 1.0),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_there_is_one_scan_over_the_stages_and_no_branch_in_it(case):
    """Whether a stage injects noise, corrects or is guided stands in the table, not in control flow."""
    make, options = CASES[case]
    table = make()
    found = list(equations(traced_sampling(table, **options)))
    scans = [equation for equation, _ in found if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [table.nfe]
    within = {equation.primitive.name for equation, inside in found if "scan" in inside}
    assert {"tanh", "mul", "add"} <= within  # the search does see the body
    assert not within & {"cond", "while", "switch"}


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc", "deis", "pndm"])
def test_the_scan_carries_the_registers_and_nothing_else(name):
    """Keys, times and noise come from the stage; so memory grows with registers, not with steps."""
    for steps in (6, 12):
        table = build(name, steps)
        (scan,) = (e for e, _ in equations(traced_sampling(table)) if e.primitive.name == "scan")
        first = scan.params["num_consts"]
        carry = scan.invars[first : first + scan.params["num_carry"]]
        assert [value.aval.shape for value in carry] == [(3, 4, 2)] * table.num_registers
        stacked = scan.invars[first + scan.params["num_carry"] :]
        assert all(value.aval.shape[0] == table.nfe for value in stacked)
        assert sum(value.aval.size for value in stacked) < table.nfe * (table.update[0].size + 12)
        assert len(scan.outvars) == table.num_registers


def test_memory_grows_with_registers_and_not_with_stages():
    def temporary_bytes(registers, stages):
        update = np.zeros((stages, registers, registers + 2))
        update[:, :, -2] = 1
        table = make_table("t", np.arange(stages, -1, -1), np.ones(stages), *np.full((2, stages), 0.7), update)

        def run(k):
            return diffusion.sample(elementwise, {}, table, k, 4, (32, 32))

        return jax.jit(run).lower(key()).compile().memory_analysis().temp_size_in_bytes

    image = 4 * 32 * 32 * 4
    few = temporary_bytes(1, 5)
    assert temporary_bytes(1, 60) - few < image
    assert 2 * image < temporary_bytes(4, 5) - few < 10 * image


def test_work_is_that_of_the_calls_linear_in_images_and_shared_by_devices():
    """The FLOPs of the compiled program, in which the body of the scan, a stage, is counted once."""

    def network(params, x, t, cond=None):
        return jnp.tanh(x @ params) + t[:, None] / 1000

    def flops(images, steps, num_devices=1):
        table = ddim(LINEAR, timesteps.uniform(LINEAR, steps))
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
        ids = jax.device_put(np.arange(images), NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(np.ones((16, 16), np.float32), NamedSharding(mesh, PartitionSpec()))

        def run(params, ids):
            return diffusion.sample(network, params, table, key(), images, (16,), sample_ids=ids)

        return jax.jit(run).lower(params, ids).compile().cost_analysis()["flops"]

    one = flops(32, 5)
    assert one > 32 * 2 * 16 * 16  # one network call at least
    assert flops(32, 25) == pytest.approx(one, rel=1e-3)
    assert flops(64, 5) == pytest.approx(2 * one, rel=0.02)
    assert 8 * flops(32, 5, num_devices=8) == pytest.approx(one, rel=0.05)


# Gradients


@pytest.mark.usefixtures("float64")
def test_gradients_flow_to_every_leaf_of_a_multistep_table():
    """Against central differences along random directions, each leaf by itself and each stage of it."""
    table, direction = solvers.unipc(LINEAR, timesteps.uniform(LINEAR, 5), 3), np.random.default_rng(0)
    assert table.num_registers == 4

    @jax.jit
    def loss(table):
        return jnp.mean(diffusion.sample(elementwise, {}, table, key(), 4, (3,)) ** 2)

    gradient = jax.jit(jax.grad(loss))(table)
    assert np.all(np.isfinite(gradient.update))
    for name in ("t", "signal", "noise", "update"):
        leaf, by_leaf = getattr(table, name), np.asarray(getattr(gradient, name))
        for stage in range(table.nfe):
            move = np.zeros_like(leaf)
            move[stage] = direction.standard_normal(leaf[stage].shape)
            up, down = (loss(sampled_at(table, name, leaf + s * 1e-6 * move)) for s in (1, -1))
            assert abs(np.sum(by_leaf[stage])) > 1e-9
            np.testing.assert_allclose(np.sum(by_leaf * move), (up - down) / 2e-6, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(gradient.tau, 0)  # tau is a record; the times that count are t


def sampled_at(table, name, value):
    arrays = {k: getattr(table, k) for k in ("tau", "t", "signal", "noise", "update")}
    return make_table(table.name, **(arrays | {name: value}))


# Every solver at every length

CALLS = []


def counted(params, x, t, cond=None):
    jax.debug.callback(lambda t: CALLS.append(float(t)), t[0], ordered=True)
    return elementwise(params, x, t)


@pytest.mark.parametrize("steps", [1, 2, T])
@pytest.mark.parametrize("name", [*NAMES, "analytic_dpm"])
def test_every_solver_samples_finite_values_with_the_calls_it_states(name, steps):
    table = build(name, steps)
    CALLS.clear()
    x = np.asarray(diffusion.sample(counted, {}, table, key(), 2, (3,)))
    jax.effects_barrier()
    assert np.all(np.isfinite(x))
    assert np.std(x) > 0
    assert len(CALLS) == table.nfe >= steps
    np.testing.assert_allclose(CALLS, table.t, rtol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "analytic_dpm"])
def test_one_step_is_the_estimate_at_the_top(name):
    """With tau = (T, 0) every solver can do no other than return D."""
    table = build(name, 1)
    x = np.sqrt(table.signal[0] ** 2 + table.noise[0] ** 2) * noise_of_start(2, (3,))
    eps = np.asarray(elementwise({}, x, np.full(2, T)))
    wanted = (x - table.noise[0] * eps) / table.signal[0]
    got = diffusion.sample(counted, {}, table, key(), 2, (3,))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [LINEAR, schedules.edm(T), schedules.rectified_flow(T)], ids=["vp", "edm", "flow"])
def test_the_start_is_noise_with_the_power_of_x_of_unit_data(schedule):
    """sqrt(a^2 + n^2): 1 where variance-preserving, 80 at EDM's top, 0.72 at 0.4 of a straight flow."""
    for top in (T, 20):
        table = ddim(schedule, [top, 3, 0])
        options = {"prediction": "x0", "return_trajectory": True}
        _, path = diffusion.sample(elementwise, {}, table, key(), 2, (3,), **options)
        wanted = np.hypot(*schedule.at(top)) * noise_of_start(2, (3,))
        np.testing.assert_allclose(path.x[0], wanted, rtol=1e-5)


def noise_of_start(number, shape):
    """The documented derivation: fold in the sample id, then the stage, 0 for the start."""
    keys = [jax.random.fold_in(jax.random.fold_in(key(), i), 0) for i in range(number)]
    return np.stack([jax.random.normal(k, shape) for k in keys])


def test_the_name_of_a_table_is_no_part_of_its_structure():
    one, other = ddpm(LINEAR, [T, 20, 0]), ddim(LINEAR, [T, 30, 0], 0.3)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    assert jax.tree.structure(one) != jax.tree.structure(ddpm(LINEAR, [T, 20, 0], "learned"))
