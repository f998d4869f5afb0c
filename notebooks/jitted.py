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
# # Inside the jitted functions
#
# What JAX traces, what XLA compiles, and how often. The same few calls work on any jitted function of this project:
# `jax.make_jaxpr`, `.lower(...)`, `.compile()`, `.cost_analysis()`, `.memory_analysis()`.

# %%
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from diffusion import gaussian, pretrained, sample, schedules, solvers, timesteps

jax.config.update("jax_pprint_use_color", False)

# %% [markdown]
# ## A formula as a jaxpr
#
# Public functions of `diffusion.gaussian` are jitted and pure. A schedule is a pytree of two float64 arrays and arrives
# as an argument, so it is data, not a constant in the program.

# %%
schedule = schedules.linear()
images, eps = jnp.zeros((4, 8, 8, 1)), jnp.ones((4, 8, 8, 1))
t = jnp.array([10, 200, 500, 1000])
print(jax.make_jaxpr(gaussian.q_sample)(schedule, images, t, eps))

# %% [markdown]
# XLA fuses all of this. Lowered, it is StableHLO; compiled, it is what runs. The cost analysis counts what the compiled
# program does.

# %%
lowered = gaussian.q_sample.lower(schedule, images, t, eps)
print(lowered.as_text()[:700], "...\n")
compiled = lowered.compile()
entry = compiled.as_text().split("ENTRY")[1]
print("ENTRY" + re.sub(r", metadata=\{.*?\}", "", entry)[:1500])


# %%
def cost(compiled):
    """flops and bytes read and written of a compiled function, where the backend reports them."""
    analysis = compiled.cost_analysis() or {}
    return {key: f"{analysis[key]:,.0f}" for key in ("flops", "bytes accessed") if key in analysis}


print(images.size, "pixels:", cost(compiled))

# %% [markdown]
# ## The sampler is one scan
#
# `sample` turns the table into the xs of a `lax.scan`. Its length is the number of network calls; its body, one stage,
# is traced once whatever the number of steps.

# %%
model, params, *_ = pretrained.load()
num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
draw = partial(sample, model.apply_fn, num_samples=4, sample_shape=model.image_shape)


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def scans(jaxpr):
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "scan"]


key = jax.random.key(0)
for S in (5, 25):
    table = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, S))
    jaxpr = jax.make_jaxpr(lambda params, table: draw(params, table, key))(params, table).jaxpr
    (scan,) = scans(jaxpr)
    body = scan.params["jaxpr"].jaxpr
    print(f"S = {S:2}: a scan of length {scan.params['length']}, {len(list(equations(jaxpr)))} equations in all")
    assert scan.params["length"] == table.nfe

# %% [markdown]
# The carry is the registers, R images; the weights pass through as constants and are not copied for each step.

# %%
constants, carried = scan.params["num_consts"], scan.params["num_carry"]
shapes = [v.aval.str_short() for v in scan.invars]
print("carried:", shapes[constants : constants + carried])
print("one row for each stage:", shapes[constants + carried :])
print(f"constants: {constants} arrays, of them {len(jax.tree.leaves(params))} weights")
print("in the body:", dict(Counter(equation.primitive.name for equation in equations(body)).most_common(8)))

# %% [markdown]
# ## How often it compiles
#
# Once for each shape of table, that is (stages, registers). eta, the grid and the solver are numbers in arrays. The
# counter below hears every compilation that JAX does. It does not depend on the network, so a toy one serves.

# %%
compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compilations.append(seconds) if event.endswith("backend_compile_duration") else None
)


def toy(params, x, t, cond):
    return params * x


def count(table, apply_fn=toy, **options):
    """How many programs are compiled to draw with a table."""
    before = len(compilations)
    sample(apply_fn, jnp.float32(0.5), table, key, 4, (8, 8, 1), **options).block_until_ready()
    return len(compilations) - before


jnp.float32(0.5)
uniform, karras = timesteps.uniform(model.schedule, 10), timesteps.karras(model.schedule, 10)
tables = {
    "ddim, the first": solvers.ddim(model.schedule, uniform),
    "another eta": solvers.ddim(model.schedule, uniform, eta=0.5),
    "another grid": solvers.ddim(model.schedule, karras),
    "ddpm": solvers.ddpm(model.schedule, uniform),
    "euler": solvers.euler(model.schedule, uniform),
    "dpm_solver_pp of order 3: two registers more": solvers.dpm_solver_pp(model.schedule, uniform, order=3),
    "deis of order 3: as many": solvers.deis(model.schedule, uniform, order=3),
    "the same on another grid": solvers.deis(model.schedule, karras, order=3),
}
counts = {label: count(table) for label, table in tables.items()}
for label, table in tables.items():
    print(f"{counts[label]:3} compiled   update {table.update.shape!s:12} {label}")
assert counts["ddim, the first"] > 0
for label in ("another eta", "another grid", "ddpm", "euler", "deis of order 3: as many", "the same on another grid"):
    assert counts[label] == 0, label

# %% [markdown]
# What does compile again: another number of samples, of stages or of registers, an option such as `clip`, and a new
# `apply_fn`. The network is a static argument, compared by identity, so a lambda made at each call compiles each time:

# %%
table = tables["another eta"]
print("clip:", count(table, clip="recompute"), "compiled, then", count(table, clip="recompute"))
new = [count(table, lambda params, x, t, cond: toy(params, x, t, cond)) for _ in range(2)]
print("a new lambda twice:", sum(new), "compiled")
assert min(new) >= 1

# %% [markdown]
# ## What a step costs
#
# Compiled ahead of time, the sampler says what it does. XLA counts the body of a loop once, so the flops hardly
# depend on the number of steps, and are those of one network call and a few additions.

# %%
ahead = jax.jit(lambda params, table: draw(params, table, key))
network = jax.jit(model.apply_fn).lower(params, jnp.zeros((4, *model.image_shape)), jnp.ones(4), None).compile()
rows = {"network": network}
for name in ("ddim", "unipc"):
    rows[f"{name}, S = 10"] = ahead.lower(params, solvers.SOLVERS[name](model.schedule, uniform)).compile()
rows["ddim, S = 50"] = ahead.lower(
    params, solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 50))
).compile()
print(f"{num_parameters:,} parameters, 4 images of {model.image_shape}")
for label, program in rows.items():
    print(f"{label:22} {cost(program)}")

# %% [markdown]
# A table of ten rows is a kilobyte. Tables of the same shape may be stacked and mapped over: here one compiled program
# draws the same noise with five values of eta.

# %%
etas = np.linspace(0, 1, 5)
stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[solvers.ddim(model.schedule, uniform, eta) for eta in etas])
print(f"one table: {sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(table))} bytes")
many = jax.jit(jax.vmap(lambda table: draw(params, table, key, clip="recompute")))(stacked)
fig, axes = plt.subplots(4, 5, figsize=(5, 4.2), layout="constrained")
for i, j in np.ndindex(4, 5):
    axes[i, j].imshow(many[j, i, ..., 0], cmap="gray", vmin=-1, vmax=1)
    axes[i, j].set(xticks=[], yticks=[])
for axis, eta in zip(axes[0], etas, strict=True):
    axis.set_title(rf"$\eta$ = {eta:g}", fontsize="medium")
plt.show()

# %% [markdown]
# ## Donation
#
# A train step replaces its state. Donated, the old state's memory becomes the new one's; without that both exist at
# once. `memory_analysis` shows the bytes shared, and the donated arrays are gone after the call.

# %%
optimizer = optax.adam(1e-3)


def step(state, key):
    params, moments = state
    x_0, eps = jax.random.normal(key, (2, 16, *model.image_shape))
    t = jnp.arange(1, 17) * 50

    def loss(params):
        x_t = gaussian.q_sample(model.schedule, x_0, t, eps)
        return jnp.mean((model.apply_fn(params, x_t, t, None) - eps) ** 2)

    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments


state = jax.tree.map(jnp.array, (params, optimizer.init(params)))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
program = jax.jit(step, donate_argnums=0).lower(state, key).compile()
memory = program.memory_analysis()
print(f"state {size / 2**20:.1f} MiB, shared by input and output {memory.alias_size_in_bytes / 2**20:.1f} MiB")
assert memory.alias_size_in_bytes >= 0.99 * size

new_state = program(state, key)
print("old weights deleted:", all(leaf.is_deleted() for leaf in jax.tree.leaves(state)))

# %% [markdown]
# The project's own train step, `diffusion.training.step.make_train_step`, donates its state in the same way; look at it
# with the calls above.
