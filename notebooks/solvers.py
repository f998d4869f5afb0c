# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solvers are tables
#
# Every sampler here is a `SamplerTable`: a few float64 arrays that one scan executes. So a sampler can be read,
# plotted, tested without a network, run backwards, and differentiated. This notebook does each of these.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from diffusion import data, pretrained, sample, schedules, solvers, timesteps
from diffusion.images import to_floats

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Reading one
#
# DDIM needs one register, what the network sees. A row says what the next `x'` is made of: the register, the denoised
# estimate D, fresh noise z. The last row returns D.

# %%
schedule = schedules.linear()
tau = timesteps.log_snr(schedule, 8)
print(solvers.ddim(schedule, tau))

# %% [markdown]
# A multistep solver keeps older estimates in further registers. DPM-Solver++ of order 2 has R1, the D of the step
# before; its first step and its last have order 1 and ignore it. The weight of R1 is negative: it extrapolates.

# %%
table = solvers.dpm_solver_pp(schedule, tau, order=2)
print(table)
print("\nall of stage 3, each row a register's next value:\n", table.update[3].round(4))
assert solvers.from_json(table.to_json()).update.tobytes() == table.update.tobytes()

# %% [markdown]
# ## All of them
#
# Calls and registers of every solver with its defaults, for eight steps:

# %%
print(f"{'solver':26}{'calls':>6}{'registers':>11}{'fresh noise':>13}")
for name, solver in solvers.SOLVERS.items():
    table = solver(schedule, tau)
    print(f"{name:26}{table.nfe:6}{table.num_registers:11}{'yes' if table.update[..., -1].any() else 'no':>13}")

# %% [markdown]
# ## Plotting one
#
# The weights with which `x'` is made, stage by stage. For constant data every method must reproduce it, so the
# weights of all D's sum to $a_s - \frac{n_s}{n_t} a_t$; they differ in how they share it out.

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
fine = timesteps.log_snr(schedule, 15)
choices = {"ddim": {}, "dpm_solver_pp": {"order": 3}, "deis": {"order": 3}}
for axis, (name, options) in zip(axes, choices.items(), strict=True):
    table = solvers.SOLVERS[name](schedule, fine, **options)
    labels = ["x", *(f"R{i}" for i in range(1, table.num_registers)), "D"]
    for column, label in enumerate(labels):
        axis.plot(table.update[:, 0, column], ".-", label=label)
    axis.set(xlabel="stage", title=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
    axis.set(xticks=range(0, len(fine) - 1, 2), ylim=(-1, 1.7))
    axis.legend(fontsize="small", loc="upper center", ncols=4, columnspacing=1)
axes[0].set_ylabel("weight in the next x")
plt.show()

# %% [markdown]
# For `deis` the registers hold noises, eps of the steps before, hence the other scale.
#
# ## Testing without a network
#
# For Gaussian data the ideal D is affine in x, so the samples are Gaussian whatever the table, and `gaussian_moments`
# computes their mean and covariance exactly. No sampling, no network, no tolerance for chance.

# %%
mean, covariance = np.array([0.5, -0.2]), np.array([[0.2, 0.05], [0.05, 0.1]])
for S in (5, 20, 80):
    found = solvers.gaussian_moments(solvers.unipc(schedule, timesteps.log_snr(schedule, S)), mean, covariance)
    print(f"unipc, S = {S:2}: mean {found[0].round(4)}, covariance {found[1].round(4).tolist()}")
print(f"data:           mean {mean}, covariance {covariance.tolist()}")

# %% [markdown]
# The mean stays 0.3% short however many steps: sampling starts from $N(0, I)$, while $x_T$ still holds a little signal,
# $a_T = 0.006$.

# %% [markdown]
# ### Observed orders
#
# The probability flow of Gaussian data has a solution in closed form, with which the variance at the last time before 0
# is known exactly. Twice the steps divide the error of a method of order p by $2^p$. Multistep methods take their full
# order to the end here (`lower_order_final=False`), which with few steps is less robust.

# %%
variance = 0.1
steps = np.array([16, 32, 64, 128, 256])


def exact_variance(schedule, tau):
    """Variance of samples that follow the flow exactly down to tau[-2], and end with D there."""
    (a_start, a), (n_start, n) = schedule.at(tau[[0, -2]])
    grown = (a**2 * variance + n**2) / (a_start**2 * variance + n_start**2) * (a_start**2 + n_start**2)
    slope = a * variance / (a**2 * variance + n**2)
    return slope**2 * grown


def errors(solver, **options):
    """(calls, relative error of the variance) for each number of steps."""
    grids = [timesteps.log_snr(schedule, S) for S in steps]
    tables = [solver(schedule, grid, **options) for grid in grids]
    found = [
        solvers.gaussian_moments(table, 0.0, variance)[1] / exact_variance(schedule, grid) - 1
        for table, grid in zip(tables, grids, strict=True)
    ]
    return np.array([table.nfe for table in tables]), np.abs(found)


full = {"lower_order_final": False}
chosen = {
    "ddim": (solvers.ddim, {}, 1),
    "dpm_solver_pp, order 2": (solvers.dpm_solver_pp, {"order": 2, **full}, 2),
    "heun": (solvers.heun, {}, 2),
    "dpm_solver, order 3": (solvers.dpm_solver, {"order": 3}, 3),
    "unipc, order 2": (solvers.unipc, {"order": 2, "variant": "exact", **full}, 3),
}
fig, axis = plt.subplots(figsize=(6.5, 4.2))
for (label, (solver, options, order)), marker in zip(chosen.items(), "os^Dv", strict=True):
    calls, error = errors(solver, **options)
    slope = -np.polyfit(np.log(calls[-3:]), np.log(error[-3:]), 1)[0]
    axis.loglog(calls, error, marker=marker, markersize=5, label=f"{label}: observed {slope:.2f}")
    print(f"{label:24} stated order {order}, observed {slope:.2f}")
    assert abs(slope - order) < 0.2
axis.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
axis.minorticks_off()
axis.set(xlabel="network calls", ylabel="relative error of the variance", title="Gaussian data, linear schedule")
axis.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Running one backwards
#
# Deterministic DDIM is a map from noise to images, and `reverse` is a table for its inverse. Each step needs eps at a
# point not yet known; more iterations solve for it more exactly, one network call each. Here real digits go to noise
# and back.

# %%
model, params, *_ = pretrained.load()
digits = jnp.asarray(to_floats(data.load("digits").images[:8]))
forward = solvers.ddim(model.schedule, timesteps.below(model.schedule, timesteps.uniform(model.schedule, 50), 980))


def run(table, x):
    return sample(model.apply_fn, params, table, jax.random.key(0), len(x), model.image_shape, x_init=x)


back = {}
for iterations in (1, 2, 4):
    noise = run(forward.reverse(iterations=iterations), digits)
    back[iterations] = run(forward, noise)
    error = jnp.sqrt(jnp.mean((back[iterations] - digits) ** 2))
    print(f"{iterations} iteration(s): rms error {error:.4f} of pixels in [-1, 1]; std of the noise {noise.std():.2f}")

fig, axes = plt.subplots(4, 8, figsize=(8, 4.4))
rows = {"image": digits, "its noise": noise, "back, 1 iteration": back[1], "back, 4 iterations": back[4]}
for row, (label, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(row, images, strict=True):
        limit = 3 if label == "its noise" else 1
        axis.imshow(image[..., 0], cmap="gray", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    row[0].set_ylabel(label, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# ## Learning when to step
#
# A table is a pytree, `sample` is differentiable, and `solvers.differentiable` makes the way from tau to the table
# differentiable, too. So the times of a few-step sampler can be learned: let its samples match those of many steps from
# the same noise (the idea of LD3, ICLR 2025). The toy is a mixture of three Gaussians on the line, whose ideal network
# is a formula.

# %%
means, spread, weights = jnp.array([-0.9, 0.0, 0.8]), 0.08, jnp.array([0.3, 0.2, 0.5])
log_alpha_bar = jnp.asarray(np.log(schedule.alpha_bar), jnp.float32)


def ideal(params, x, t, cond):
    """eps for the mixture; x is [B, 1]."""
    log_power = jnp.interp(t, jnp.arange(len(log_alpha_bar)), log_alpha_bar)[:, None]
    a, n2 = jnp.exp(log_power / 2), -jnp.expm1(log_power)
    variance = a**2 * spread**2 + n2
    share = jax.nn.softmax(jnp.log(weights) - (x - a * means) ** 2 / (2 * variance))
    x_0 = jnp.sum(share * (means + a * spread**2 / variance * (x - a * means)), axis=-1, keepdims=True)
    return (x - a * x_0) / jnp.sqrt(n2)


def points(table, x_T):
    return sample(ideal, (), table, jax.random.key(0), len(x_T), (1,), x_init=x_T)


S = 5
x_T = jax.random.normal(jax.random.key(1), (1024, 1))
teacher = points(solvers.unipc(schedule, timesteps.log_snr(schedule, 200)), x_T)
make_table = solvers.differentiable(solvers.ddim, schedule, S)


def to_tau(logits):
    """Intervals of tau from T to 0, as shares of T: strictly descending for any logits."""
    shares = jax.nn.softmax(logits)
    return jnp.append(schedule.num_timesteps * jnp.cumsum(shares[::-1])[::-1].at[0].set(1.0), 0.0)


def loss(logits):
    return jnp.mean((points(make_table(to_tau(logits)), x_T) - teacher) ** 2)


optimizer = optax.adam(0.05)


@jax.jit
def update(logits, moments):
    value, gradient = jax.value_and_grad(loss)(logits)
    steps, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(logits, steps), moments, value


logits = jnp.zeros(S)  # uniform
moments, history = optimizer.init(logits), []
for _ in range(200):
    logits, moments, value = update(logits, moments)
    history.append(float(value))
learned = np.asarray(to_tau(logits), np.float64)

# %% [markdown]
# On fresh noise, the learned times against the fixed grids, all with DDIM in five steps:

# %%
fresh = jax.random.normal(jax.random.key(2), (4096, 1))
truth = points(solvers.unipc(schedule, timesteps.log_snr(schedule, 200)), fresh)
grids = {name: timesteps.GRIDS[name](schedule, S) for name in ("uniform", "quadratic", "log_snr", "karras")}
grids["learned"] = learned
rms = {}
for name, tau in grids.items():
    rms[name] = float(jnp.sqrt(jnp.mean((points(solvers.ddim(schedule, tau), fresh) - truth) ** 2)))
    print(f"{name:10} rms error {rms[name]:.4f}   tau {np.round(tau, 1).tolist()}")
assert rms["learned"] < min(error for name, error in rms.items() if name != "learned")

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1, 1.2, 1.2))
left.plot(np.sqrt(history))
left.set(xlabel="gradient step", ylabel="rms distance to the teacher", ylim=(0, None))
for row, tau in enumerate(grids.values()):
    middle.plot(tau, np.full(len(tau), row), "o-", markersize=4, linewidth=0.8)
middle.set(yticks=range(len(grids)), yticklabels=grids, xlabel="timestep t")
middle.invert_xaxis()
bins = np.linspace(-1.3, 1.3, 80)
right.hist(np.ravel(truth), bins, histtype="stepfilled", alpha=0.3, color="grey", density=True, label="200 steps")
for name, color in [("uniform", "C0"), ("learned", "C4")]:
    found = np.ravel(points(solvers.ddim(schedule, grids[name]), fresh))
    right.hist(found, bins, histtype="step", color=color, density=True, label=f"{name}, {S} steps")
right.set(xlabel="x", ylabel="density of the samples")
right.legend(fontsize="small")
plt.show()
