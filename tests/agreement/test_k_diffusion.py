"""Our tables agree with k-diffusion's samplers, at every network call and in the sample, in float64.

Its package asks for much that its samplers do not need, so only the module of the samplers is loaded, with empty
modules in the place of what is missing. They run in units of the signal: y = x / a, sigma = n / a.
"""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import ideal_network, mixture_denoiser

torch = pytest.importorskip("torch")
SPEC = importlib.util.find_spec("k_diffusion")
if SPEC is None:
    pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion", allow_module_level=True)

from diffusion import sample, schedules, timesteps  # noqa: E402
from diffusion.adaptive import adaptive  # noqa: E402
from diffusion.commands.samplers import make_table  # noqa: E402
from diffusion.solvers import (  # noqa: E402
    dpm_solver,
    dpm_solver_pp,
    dpm_solver_pp_sde,
    dpm_solver_pp_singlestep,
    edm,
    euler_ancestral,
)

LINEAR = schedules.linear()
GRIDS = {"karras": timesteps.karras(LINEAR, 8), "log_snr": timesteps.log_snr(LINEAR, 7), "few": [600, 250, 40, 0]}
every_grid = pytest.mark.parametrize("tau", GRIDS.values(), ids=GRIDS.keys())
etas = pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (1.0, 1.1)])
START = np.linspace(-2.5, 2.5, 11)[None]
NOISE = np.random.default_rng(1).standard_normal((100, *START.shape))


@pytest.fixture(scope="module")
def k():
    """k_diffusion.sampling."""
    stubs = {"k_diffusion": types.ModuleType("k_diffusion"), "k_diffusion.utils": types.ModuleType("utils")}
    stubs["k_diffusion"].utils = stubs["k_diffusion.utils"]
    stubs["k_diffusion.utils"].append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    for name in ("torchdiffeq", "torchsde"):
        stubs[name] = types.ModuleType(name)
    stubs["torchdiffeq"].odeint = stubs["torchsde"].BrownianTree = None
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        path = Path(SPEC.submodule_search_locations[0]) / "sampling.py"
        spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name) if module_before is None else sys.modules.update({name: module_before})
    return module


class Network:
    """The mixture's denoiser in units of the signal, with what it saw in ours."""

    def __init__(self):
        self.path = []

    def __call__(self, y, sigma):
        sigma = float(sigma[0])
        a = 1 / np.sqrt(1 + sigma**2)
        self.path.append(y.numpy() * a)
        return torch.from_numpy(mixture_denoiser(self.path[-1], a, a * sigma))


def sigmas(tau):
    a, n = LINEAR.at(np.asarray(tau, np.float64))
    return torch.from_numpy(n / a)


def theirs(sampler, tau, **options):
    network = Network()
    a = LINEAR.at(float(tau[0]))[0]
    last = sampler(network, torch.from_numpy(START / a), sigmas(tau), disable=True, **options)
    return [*network.path, last.numpy()]


def ours(table, z=None):
    registers, path = np.zeros((table.num_registers, *START.shape)), []
    registers[0] = START
    for i, (a, n, rows) in enumerate(zip(table.signal, table.noise, table.update, strict=True)):
        path.append(registers[0])
        noise = np.zeros_like(START) if z is None else z[i]
        registers = np.tensordot(rows, np.stack([*registers, mixture_denoiser(path[-1], a, n), noise]), axes=1)
    return [*path, registers[0]]


def agree(one, other):
    assert len(one) == len(other)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def one_a_step(stages_of_a_step, steps):
    """A noise sampler that draws once a step, and the same noise at the last stage of each step of ours."""
    ours = np.zeros((steps * stages_of_a_step, *START.shape))
    ours[stages_of_a_step - 1 :: stages_of_a_step] = NOISE[:steps]
    drawn = iter(NOISE)
    return ours, lambda *_: torch.from_numpy(next(drawn))


@every_grid
@etas
def test_ancestral_samplers_are_deterministic_steps_with_noise(k, tau, eta, s_noise):
    for sampler, build, stages in (
        (k.sample_euler_ancestral, euler_ancestral, 1),
        (k.sample_dpm_2_ancestral, lambda *a, **o: dpm_solver(*a, 2, **o), 2),
        (k.sample_dpmpp_2s_ancestral, lambda *a, **o: dpm_solver_pp_singlestep(*a, 2, **o), 2),
    ):
        z, sample_noise = one_a_step(stages, len(tau) - 1)
        table = build(LINEAR, tau, eta=eta, s_noise=s_noise)
        agree(ours(table, z), theirs(sampler, tau, eta=eta, s_noise=s_noise, noise_sampler=sample_noise))


@every_grid
@etas
@pytest.mark.parametrize("r", [0.5, 0.3])
@pytest.mark.parametrize("path", ["sigma", "independent"])
def test_dpmpp_sde_draws_from_a_brownian_path_in_sigma(k, tau, eta, s_noise, r, path):
    """Their noise tree gives W(b) - W(a) over the root of b - a; here from two independent increments a step."""
    z = NOISE[: 2 * len(tau) - 3]
    whole = sigmas(tau).numpy()

    def increments(start, end):
        i = int(np.argmin(np.abs(whole - float(start))))
        middle = np.exp((1 - r) * np.log(whole[i]) + r * np.log(whole[i + 1]))
        at_end = abs(float(end) - whole[i + 1]) < 1e-9 * whole[i + 1]
        if not at_end or path == "independent":
            return torch.from_numpy(z[2 * i + at_end])
        parts = np.sqrt([whole[i] - middle, middle - whole[i + 1]]) / np.sqrt(whole[i] - whole[i + 1])
        return torch.from_numpy(parts[0] * z[2 * i] + parts[1] * z[2 * i + 1])

    table = dpm_solver_pp_sde(LINEAR, tau, eta, s_noise, r, path)
    agree(ours(table, z), theirs(k.sample_dpmpp_sde, tau, eta=eta, s_noise=s_noise, r=r, noise_sampler=increments))


@every_grid
@pytest.mark.parametrize(("step", "stages"), [("euler", 1), ("heun", 2), ("dpm_2", 2)])
def test_churn_is_algorithm_2_with_each_kind_of_step(k, monkeypatch, tau, step, stages):
    sampler = {"euler": k.sample_euler, "heun": k.sample_heun, "dpm_2": k.sample_dpm_2}[step]
    options = {"s_churn": 3.0, "s_noise": 1.05}
    largest = float(sigmas(tau)[0]) * 0.99  # tau starts at T, above which there is no noise
    z, _ = one_a_step(stages, len(tau) - 1)
    drawn = iter([START, *NOISE])  # what the first step draws is not used
    monkeypatch.setattr(k.torch, "randn_like", lambda x: torch.from_numpy(next(drawn)))
    table = edm(LINEAR, tau, s_max=largest, step=step, **options)
    agree(ours(table, z), theirs(sampler, tau, s_tmax=largest, **options))


@pytest.mark.parametrize("calls", [3, 4, 5, 6, 9, 10])
def test_dpm_fast_spends_exactly_the_calls_asked(k, monkeypatch, calls):
    """On times even in lambda; theirs ends at sigma_min, where ours has one call more, to t = 0."""
    tau = timesteps.log_snr(LINEAR, calls + 1)
    table = dpm_solver(LINEAR, tau, 3, calls="fast")
    assert table.nfe == calls + 1
    network = Network()
    y = torch.from_numpy(START / LINEAR.at(float(tau[0]))[0])
    times = torch.from_numpy(LINEAR.half_log_snr(tau[[0, -2]]))
    linspace = torch.linspace  # in float64, not in the default type
    monkeypatch.setattr(k.torch, "linspace", lambda a, b, n, device: linspace(a, b, n, dtype=torch.float64))
    last = k.DPMSolver(network, {}).dpm_solver_fast(y, *times, calls).numpy()
    agree(ours(table)[: calls + 1], [*network.path, last * LINEAR.at(1)[0]])


@every_grid
@pytest.mark.parametrize("s_noise", [1.0, 1.1])
def test_multistep_sde_samplers_take_s_noise(k, tau, s_noise):
    for solver_type, variant in (("heun", "exact"), ("midpoint", "official")):
        z, draw = one_a_step(1, len(tau) - 1)
        table = dpm_solver_pp(LINEAR, tau, 2, 0.7, variant, lower_order_final=False, s_noise=s_noise)
        options = {"eta": 0.7, "s_noise": s_noise, "solver_type": solver_type, "noise_sampler": draw}
        agree(ours(table, z), theirs(k.sample_dpmpp_2m_sde, tau, **options))


@every_grid
@pytest.mark.parametrize(
    ("name", "stages"),
    [("dpmpp_2m", 1), ("dpmpp_2m_sde", 1), ("dpmpp_3m_sde", 1), ("dpmpp_2s_ancestral", 2), ("lms", 1)],
)
def test_a_name_of_theirs_is_their_sampler(k, tau, name, stages):
    z, draw = one_a_step(stages, len(tau) - 1)
    noisy = "sde" in name or "ancestral" in name
    table = make_table(LINEAR, name, 0, "explicit:times=" + ",".join(str(float(t)) for t in tau[:-1]))
    options = {"noise_sampler": draw} if noisy else {}
    one, other = ours(table, z if noisy else None), theirs(getattr(k, f"sample_{name}"), tau, **options)
    if name == "lms":  # theirs integrates with a tolerance
        np.testing.assert_allclose(one, other, atol=1e-5)
    else:
        agree(one, other)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("tolerance", [0.05, 0.001])
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_the_adaptive_solver_takes_the_steps_of_sample_dpm_adaptive(k, float64, order, tolerance):
    """Sample by sample, because its error is that of the whole batch; ours asks once more at the end."""
    rtol, atol = (float(np.float32(value)) for value in (tolerance, tolerance / 6))  # theirs are of that type
    solver = adaptive(LINEAR, [900, 0], order, rtol=rtol, atol=atol)
    network = ideal_network(LINEAR, lambda x, a, n: mixture_denoiser(x, a, n, jnp))
    start = np.array([[-1.9, 0.2], [0.3, 0.8], [2.1, -0.4]])
    shared = {"prediction": "x0", "return_trajectory": True}
    found, calls = sample(network, None, solver, jax.random.key(0), 3, (2,), x_init=jnp.asarray(start), **shared)
    first, last = sigmas(solver.t)
    options = {"order": order, "rtol": rtol, "atol": atol, "disable": True, "return_info": True}
    for x, ours, count in zip(start, found, calls, strict=True):
        y = torch.from_numpy(x / LINEAR.at(900.0)[0])[None]
        y, info = k.sample_dpm_adaptive(
            Network(), y, torch.tensor(last).double(), torch.tensor(first).double(), **options
        )
        assert info["nfe"] + 1 == count
        a, n = LINEAR.at(solver.end)
        np.testing.assert_allclose(ours, mixture_denoiser(a * y.numpy()[0], a, n), rtol=0, atol=1e-10)
