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
# # From strided sampling to DDIM
#
# A diffusion model is trained on $T$ noise levels and need not be sampled on all of them. This notebook derives,
# formula by formula, what changes when a sampler skips levels, and ends at DDIM's update. Each identity is computed
# in float64 and asserted.
#
# Notation, as everywhere in this project: $\bar\alpha_t$ is signal power with $\bar\alpha_0 = 1$, so the index is the
# timestep; $a_t = \sqrt{\bar\alpha_t}$, $n_t = \sqrt{1 - \bar\alpha_t}$, $\lambda_t = \log(a_t / n_t)$; a step goes
# from $t$ down to $s < t$.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from diffusion import gaussian, schedules, solvers, timesteps

jax.config.update("jax_enable_x64", True)  # the identities below are exact; float32 would blur them
plt.rcParams.update({"figure.figsize": (9, 3.4), "figure.constrained_layout.use": True, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
rng = np.random.default_rng(0)

linear, cosine = schedules.linear(), schedules.cosine()
T = linear.num_timesteps

# %% [markdown]
# ## 1. The forward process
#
# One step adds a little noise, $q(x_t | x_{t-1}) = N(\sqrt{1 - \beta_t}\, x_{t-1},\ \beta_t)$. Many steps make one
# jump,
#
# $$q(x_t | x_0) = N(a_t x_0,\ n_t^2), \qquad \bar\alpha_t = \prod_{i \le t} (1 - \beta_i).$$

# %%
fig, (left, right) = plt.subplots(1, 2)
t = np.arange(T + 1)
for name, schedule, color in [("linear", linear, "C0"), ("cosine", cosine, "C1")]:
    left.plot(t, schedule.alpha_bar, color, label=name)
    right.plot(t[1:], schedule.half_log_snr(t[1:]), color, label=name)
left.set(xlabel="timestep t", ylabel=r"signal power $\bar\alpha_t$")
right.set(xlabel="timestep t", ylabel=r"half log-SNR $\lambda_t$ (nats)")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# The product formula, and the jump as a chain of single steps: the mean coefficients multiply, and each step scales the
# variance so far and adds its own.

# %%
np.testing.assert_allclose(linear.alpha_bar[1:], np.cumprod(1 - linear.betas), rtol=1e-12)
mean, variance = 1.0, 0.0
for beta in linear.betas:
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
np.testing.assert_allclose([mean**2, variance], [linear.alpha_bar[-1], linear.noise_var[-1]], rtol=1e-10)

# %% [markdown]
# Nothing in this is special to neighbours. For any $s < t$,
#
# $$q(x_t | x_s) = N\Big(\frac{a_t}{a_s} x_s,\ 1 - \frac{\bar\alpha_t}{\bar\alpha_s}\Big),$$
#
# and jumping $0 \to s \to t$ is jumping $0 \to t$.

# %%
s, t = 400, 700
transition = schedules.transition_var(
    linear.alpha_bar[t], linear.noise_var[t], linear.alpha_bar[s], linear.noise_var[s]
)
np.testing.assert_allclose(transition, 1 - linear.alpha_bar[t] / linear.alpha_bar[s], rtol=1e-12)
ratio = linear.alpha_bar[t] / linear.alpha_bar[s]
np.testing.assert_allclose(ratio * linear.noise_var[s] + transition, linear.noise_var[t], rtol=1e-12)

# %% [markdown]
# Why `noise_var` is stored beside `alpha_bar`: at small $t$ both $\bar\alpha_t$ and 1 are nearly equal, and float32 has
# too few digits for their difference.

# %%
recomputed = 1 - np.float32(linear.alpha_bar)
relative_error = np.abs(recomputed[1:] / linear.noise_var[1:] - 1)
print(f"1 - alpha_bar in float32: relative error {relative_error[0]:.1e} at t = 1, {relative_error[-1]:.1e} at t = T")
assert relative_error[0] > 1e-4

# %% [markdown]
# ## 2. Subsequences
#
# A sampler visits $\tau_0 > \tau_1 > \dots > \tau_S = 0$. The literal rule "one update every $\lceil T/S \rceil$ steps"
# (`strided`) does not always make $S$ steps; `uniform` does.

# %%
counts = np.arange(1, T + 1)
made = {grid.__name__: [len(grid(linear, S)) - 1 for S in counts] for grid in (timesteps.strided, timesteps.uniform)}
assert np.array_equal(made["uniform"], counts)
print(f"strided misses the number asked for at {np.sum(np.array(made['strided']) != counts)} of {T} values of S")
print(f"for example {made['strided'][600 - 1]} steps where S = 600")

fig, (left, right) = plt.subplots(1, 2, width_ratios=(1, 1.6))
left.plot(counts, made["strided"], label="strided")
left.plot(counts, made["uniform"], "--", label="uniform")
left.set(xlabel="steps asked for, S", ylabel="steps made")
left.legend()
for row, grid in enumerate(timesteps.GRIDS.values()):
    tau = grid(linear, 10)
    right.plot(tau, np.full(len(tau), row), "o-", markersize=4, linewidth=0.7)
right.set(yticks=range(len(timesteps.GRIDS)), yticklabels=timesteps.GRIDS, xlabel="timestep t")
right.set_title("every grid, S = 10, linear schedule", fontsize="medium")
right.invert_yaxis()
right.invert_xaxis()
plt.show()

# %% [markdown]
# Some grids start below $T$. Started from $N(0, I)$ there, a sampler ignores the signal that $x$ should hold:

# %%
for name in ("quadratic", "leading"):
    start = timesteps.GRIDS[name](linear, 10)[0]
    print(f"{name:9} starts at t = {start}, where alpha_bar is {linear.alpha_bar[start]:.4f}")

# %% [markdown]
# ## 3. The respaced posterior
#
# Bayes' rule for Gaussians, with $\alpha = \bar\alpha_t / \bar\alpha_s$ and $\beta = 1 - \alpha$ of *this* step:
#
# $$q(x_s | x_t, x_0) = N\Big(\frac{\sqrt{\alpha}\,(1 - \bar\alpha_s)}{1 - \bar\alpha_t} x_t
# + \frac{\sqrt{\bar\alpha_s}\,\beta}{1 - \bar\alpha_t} x_0,\ \tilde\beta\Big),
# \qquad \tilde\beta = \beta\,\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}.$$
#
# To check it without the formula: precisions add. $x_s$ has the prior $N(a_s x_0, n_s^2)$ and is seen through
# $x_t = \frac{a_t}{a_s} x_s + \sqrt{\beta}\, z$.

# %%
x_0, eps = rng.normal(size=(2, 1000))
x_t = gaussian.q_sample(linear, x_0, t, eps)
mean, variance = gaussian.posterior(linear, x_t, x_0, t, s)

signal, noise = linear.at(np.arange(T + 1))
slope = signal[t] / signal[s]
precision = 1 / noise[s] ** 2 + slope**2 / transition
np.testing.assert_allclose(variance, 1 / precision, rtol=1e-12)
bayes_mean = (signal[s] * x_0 / noise[s] ** 2 + slope * x_t / transition) / precision
np.testing.assert_allclose(mean, bayes_mean, atol=1e-12)

# %% [markdown]
# ### Why the one-step beta fails for strides above 1
#
# With $S$ steps, the step from $t$ to $s$ removes the noise of $T/S$ original steps. Its $\beta$ is
# $1 - \bar\alpha_t / \bar\alpha_s$, tens of times the tabulated $\beta_t$ where $S = 10$.

# %%
fig, (left, right) = plt.subplots(1, 2)
for S in (1000, 100, 25, 10):
    tau = timesteps.uniform(linear, S)
    respaced = 1 - linear.alpha_bar[tau[:-1]] / linear.alpha_bar[tau[1:]]
    left.semilogy(tau[:-1], respaced, marker="." if S < 100 else None, label=f"S = {S}")
left.set(xlabel="timestep t", ylabel=r"$1 - \bar\alpha_t / \bar\alpha_s$")
left.legend()
np.testing.assert_allclose(1 - linear.alpha_bar[1:] / linear.alpha_bar[:-1], linear.betas, rtol=1e-9)  # S = T


def with_one_step_beta(schedule, tau):
    """Builds DDPM's update with the original beta_t in every step, as if s were t - 1."""
    x, D, z = solvers.columns(1)
    stages = []
    for at, s in zip(solvers.grid_levels(schedule, tau), tau[1:], strict=False):
        beta, alpha_bar_t = schedule.betas[int(at.t) - 1], at.signal**2
        previous = alpha_bar_t / (1 - beta)  # alpha_bar of t - 1, which is not where x goes
        keep = np.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar_t)
        add = np.sqrt(previous) * beta / (1 - alpha_bar_t)
        sigma = np.sqrt(beta * (1 - previous) / (1 - alpha_bar_t)) * (s > 0)
        stages.append(solvers.Stage(at, [keep * x + add * D + sigma * z]))
    return solvers.build("one-step beta", tau, stages, num_registers=1)


steps = np.unique(np.geomspace(5, T, 12).astype(int))
data_mean, data_variance = 0.5, 0.1
for name, make in [("one-step beta", with_one_step_beta), ("respaced", solvers.ddpm)]:
    tables = [make(linear, timesteps.uniform(linear, S)) for S in steps]
    variances = np.array([solvers.gaussian_moments(table, data_mean, data_variance)[1] for table in tables])
    right.loglog(steps, variances, "o-", markersize=3, label=name)
right.axhline(data_variance, color="grey", linestyle="--", label="data")
right.set(xlabel="steps S", ylabel="variance of the samples")
right.legend()
plt.show()

# %% [markdown]
# On the right, data drawn from $N(0.5, 0.1)$ with the ideal network: `gaussian_moments` propagates mean and variance
# through the table exactly. The one-step update barely moves when $S \ll T$, so its samples are still noise; the
# respaced one converges. With $S = T$ both are the same table:

# %%
full = timesteps.uniform(linear, T)
one_step, respaced = with_one_step_beta(linear, full), solvers.ddpm(linear, full)
np.testing.assert_allclose(one_step.update[:-1], respaced.update[:-1], rtol=1e-9, atol=1e-12)
fewer = timesteps.uniform(linear, 10)
broken = solvers.gaussian_moments(with_one_step_beta(linear, fewer), data_mean, data_variance)
print(f"S = 10: mean {broken[0]:.2f} and variance {broken[1]:.2f} with the one-step beta, not 0.5 and 0.1")

# %% [markdown]
# ### Variances
#
# The noise of a step may have the posterior's variance $\tilde\beta$ (`small`) or $\beta$ (`large`). With $S = T$ the
# two part only in the last few steps, with $S = 10$ over half of the way. The last step, to $s = 0$, injects none
# with either.

# %%
fig, axes = plt.subplots(1, 2, sharey=True)
for axis, S in zip(axes, (T, 10), strict=True):
    tau = timesteps.uniform(linear, S)
    for variance in ("large", "small"):
        sigma = solvers.ddpm(linear, tau, variance=variance).update[:, 0, -1]
        assert sigma[-1] == 0
        axis.semilogy(tau[:-2], sigma[:-1], marker="." if S == 10 else None, label=variance)
    axis.set(xlabel="timestep t", title=f"S = {S}")
axes[0].set_ylabel(r"std of fresh noise $\sigma$ (pixel units)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## 4. DDIM: splitting the noise
#
# Training looks at the marginals $q(x_t | x_0)$ alone. So any rule that leads from the marginal of $x_t$ to that of
# $x_s$ may be used with the same network. Write the noise in $x_s$ as a mix of the noise in $x_t$ and fresh noise,
#
# $$\epsilon_s = A\, \epsilon_t + B\, z, \qquad A^2 + B^2 = 1.$$
#
# It has unit variance for every such $A, B$, hence $x_s = a_s x_0 + n_s \epsilon_s$ has the right marginal. DDIM takes
#
# $$B = \frac{\sigma}{n_s}, \qquad \sigma = \eta\, \frac{n_s}{n_t} \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}},$$
#
# $$x_s = a_s \hat x_0 + \sqrt{n_s^2 - \sigma^2}\, \hat\epsilon + \sigma z.$$

# %%
tau = timesteps.uniform(linear, 10)
t, s = tau[:-1], tau[1:]
fig, (left, right) = plt.subplots(1, 2)
for eta in (0.0, 0.5, 1.0):
    A, B = gaussian.split_noise(linear, t, s, eta)
    np.testing.assert_allclose(A**2 + B**2, 1, rtol=1e-12)
    sigma = gaussian.ddim_sigma(linear, t, s, eta)
    formula = eta * noise[s] / noise[t] * np.sqrt(1 - linear.alpha_bar[t] / linear.alpha_bar[s])
    np.testing.assert_allclose(sigma, formula, atol=1e-12)
    # The marginal of x_s: its mean is a_s x_0, and the noise adds up to n_s^2.
    np.testing.assert_allclose((noise[s] * A) ** 2 + sigma**2, linear.noise_var[s], atol=1e-12)
    left.plot(t[:-1], A[:-1], "o-", markersize=4, label=rf"A, $\eta$ = {eta:g}")
    left.plot(t[:-1], B[:-1], "s--", markersize=4, color=left.lines[-1].get_color(), label=rf"B, $\eta$ = {eta:g}")
    right.plot(t, sigma, "o-", markersize=4, label=rf"$\eta$ = {eta:g}")
left.set(xlabel="timestep t", ylabel="A and B", ylim=(-0.05, 1.4), title="S = 10, without the step to s = 0")
left.legend(ncols=3, fontsize="small", loc="upper center")
right.set(xlabel="timestep t", ylabel=r"$\sigma$ (pixel units)", title="S = 10")
right.legend()
plt.show()

# %% [markdown]
# ### The two ends of eta
#
# $\eta = 0$ draws nothing: the sample is a function of $x_T$. $\eta = 1$ is the respaced posterior with $\tilde\beta$,
# mean and variance alike. It follows by putting $\hat\epsilon = (x_t - a_t \hat x_0) / n_t$ into the update.

# %%
assert np.all(solvers.ddim(linear, tau, eta=0.0).update[:, 0, -1] == 0)
np.testing.assert_allclose(
    solvers.ddim(linear, tau, eta=1.0).update, solvers.ddpm(linear, tau, variance="small").update, atol=1e-15
)

t, s = 700, 400
A, B = gaussian.split_noise(linear, t, s, 1.0)
eps_hat = gaussian.predict_eps(linear, x_t, t, x_0)
ddim_mean = signal[s] * x_0 + noise[s] * A * eps_hat
posterior_mean, posterior_variance = gaussian.posterior(linear, x_t, x_0, t, s)
np.testing.assert_allclose(ddim_mean, posterior_mean, atol=1e-12)
np.testing.assert_allclose((noise[s] * B) ** 2, posterior_variance, rtol=1e-12)

# %% [markdown]
# The DDIM paper's $\hat\sigma$ keeps the mean of $\eta = 1$ and takes the larger noise
# $\sqrt{1 - \bar\alpha_t / \bar\alpha_s}$. This is the respaced posterior with `large`:

# %%
hat = solvers.sigma_hat(linear, tau).update[:-1, 0]
np.testing.assert_allclose(hat, solvers.ddpm(linear, tau, variance="large").update[:-1, 0], atol=1e-15)
np.testing.assert_allclose(hat[:, :2], solvers.ddim(linear, tau, eta=1.0).update[:-1, 0, :2], atol=1e-15)
np.testing.assert_allclose(hat[:, 2], np.sqrt(1 - linear.alpha_bar[tau[:-2]] / linear.alpha_bar[tau[1:-1]]), rtol=1e-12)

# %% [markdown]
# ### What eta costs
#
# With the true marginal and an ideal network, how wrong is the variance of the samples? First order in $1/S$ for every
# $\eta$, with a larger constant for more noise.

# %%
steps = np.array([10, 20, 50, 100, 200, 500, 1000])
fig, axis = plt.subplots(figsize=(5.5, 3.6))
for eta in (0.0, 0.5, 1.0):
    tables = [solvers.ddim(cosine, timesteps.uniform(cosine, S), eta=eta) for S in steps]
    errors = [abs(solvers.gaussian_moments(table, data_mean, data_variance)[1] / data_variance - 1) for table in tables]
    axis.loglog(steps, errors, "o-", markersize=4, label=rf"$\eta$ = {eta:g}")
axis.loglog(steps, 1.0 / steps, "k:", label="slope -1")
axis.set(xlabel="steps S", ylabel="relative error of the variance", title="Gaussian data, cosine schedule, uniform tau")
axis.legend()
plt.show()

# %% [markdown]
# ### Predictions convert
#
# A network may predict $\epsilon$, $x_0$ or $v = a_t \epsilon - n_t x_0$. At any level two of $x_t, x_0, \epsilon, v$
# give the others:
#
# $$\hat x_0 = \frac{x_t - n_t \epsilon}{a_t} = a_t x_t - n_t v.$$

# %%
v = gaussian.velocity(linear, x_0, t, eps)
np.testing.assert_allclose(gaussian.predict_x0(linear, x_t, t, eps), x_0, atol=1e-12)
np.testing.assert_allclose(signal[t] * x_t - noise[t] * v, x_0, atol=1e-12)
np.testing.assert_allclose(gaussian.predict_eps(linear, x_t, t, x_0), eps, atol=1e-12)

# %% [markdown]
# The first form divides by $a_t$: it amplifies an error of $\hat\epsilon$ by $n_t / a_t$, which is the reason for
# clipping $\hat x_0$, and has no answer where $a_T = 0$.

# %%
for name, schedule in [("linear", linear), ("cosine", cosine)]:
    a, n = schedule.at(T)
    print(f"{name}: an error of 0.01 in eps at t = T is one of {0.01 * n / a:.3g} in x_0")
print("zero terminal SNR:", gaussian.predict_x0(schedules.zero_terminal_snr(linear), x_t[:3], T, eps[:3]))

# %% [markdown]
# Each step so far was $x_s = k\, x_t + b\, \hat x_0 + \sigma z$ with three numbers. That is all a table holds for
# DDIM; the other samplers add columns for older estimates. The notebook on solvers goes on from here.

# %%
print(solvers.ddim(linear, tau, eta=0.5))
