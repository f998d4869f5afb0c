"""The sampler table: every fixed-step sampler as a few small arrays.

A sampler is an explicit general linear method with one network call a stage. It holds R registers (images); register
0 is what the network sees, and the sample at the end. Stage i computes

    D  = the denoised estimate of x_0 from register 0 at time t[i]
    R' = update[i] @ [R_0, ..., R_{R-1}, D, z]        z fresh standard normal noise

A solver is a function (schedule, tau, options) -> SamplerTable: float64 arithmetic with no loop over images, no state
and no JAX. `diffusion.sample` executes any table with one compiled scan.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError


class _Label:
    """Carries a table's name through pytrees without making them differ."""

    def __init__(self, text):
        self.text = text

    def __eq__(self, other):
        return isinstance(other, _Label)

    def __hash__(self):
        return hash(_Label)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler. A pytree of arrays, so that it can be traced, differentiated and stacked.

    Tables of one shape have one structure, whatever their names: another sampler compiles nothing.

    Attributes:
      tau: the grid, [S + 1], descending to 0.
      t: the time given to the network in each stage, [stages].
      signal, noise: a_t and n_t at these times, [stages]; they turn any kind of prediction into D.
      update: [stages, R, R + 2]; columns are the registers, then D, then z.
      name: what to call the sampler.
    """

    tau: Float[np.ndarray, "S+1"]
    t: Float[np.ndarray, "stages"]
    signal: Float[np.ndarray, "stages"]
    noise: Float[np.ndarray, "stages"]
    update: Float[np.ndarray, "stages R R+2"]
    name: str

    def tree_flatten(self):
        return (self.tau, self.t, self.signal, self.noise, self.update), _Label(self.name)

    @classmethod
    def tree_unflatten(cls, label, arrays):
        return cls(*arrays, name=label.text)

    @property
    def nfe(self) -> int:
        """Number of network calls: one a stage."""
        return self.t.shape[0]

    @property
    def num_registers(self) -> int:
        """R, the number of images that the scan carries."""
        return self.update.shape[1]

    def __str__(self) -> str:
        """A readable table of at most 30 stages: times, signal, noise, and the row that makes the next x."""
        columns = [*(f"R{i}" for i in range(self.num_registers)), "D", "z"]
        lines = [
            f"{self.name}: {self.nfe} network calls, {self.num_registers} register(s), tau {self.tau[0]:g} to 0",
            f"{'t':>9} {'signal':>9} {'noise':>9} | x' = " + " ".join(f"{c:>9}" for c in columns),
        ]
        for i in range(self.nfe):
            if self.nfe > 30 and 15 <= i < self.nfe - 15:
                lines += [f"{'...':>9}"] * (i == 15)
                continue
            row = " ".join(f"{v:9.5f}" for v in np.asarray(self.update[i, 0]))
            lines.append(f"{self.t[i]:9.2f} {self.signal[i]:9.5f} {self.noise[i]:9.5f} |      {row}")
        return "\n".join(lines)


def make_table(name: str, tau, t, signal, noise, update) -> SamplerTable:
    """A checked table in float64; arguments as SamplerTable's attributes.

    Raises:
      InputError: an entry is not finite, as where a solver divides by a signal of zero.
    """
    arrays = [np.asarray(a, np.float64) for a in (tau, t, signal, noise, update)]
    for label, array in zip(("tau", "t", "signal", "noise", "update"), arrays, strict=True):
        if not np.all(np.isfinite(array)):
            stage = int(np.argwhere(~np.isfinite(array))[0][0])
            raise InputError(f"{name}: {label} is not finite at stage {stage}; this solver cannot take this grid")
    stages, registers, columns = arrays[-1].shape
    assert columns == registers + 2
    assert all(a.shape == (stages,) for a in arrays[1:4])
    return SamplerTable(*arrays, name=name)


def one_register(name: str, schedule, tau, keep, add, sigma) -> SamplerTable:
    """The table of a one-step method x_s = keep x_t + add D + sigma z; each coefficient is [S]."""
    signal, noise = schedule.at(tau[:-1])
    return make_table(name, tau, tau[:-1], signal, noise, np.stack([keep, add, sigma], axis=-1)[:, None, :])


def gaussian_moments(table: SamplerTable, mean: float, variance: float) -> tuple[float, float]:
    """Exact mean and variance of a pixel of the samples when the data is N(mean, variance), with no sampling.

    For such data the ideal D is affine in x: D = mean + (a variance / v)(x - a mean) with v = a^2 variance + n^2. So
    the registers stay jointly Gaussian and their moments follow from the table alone. Register 0 starts as N(0, 1).
    """
    first, second = np.zeros(table.num_registers), np.zeros((table.num_registers,) * 2)
    second[0, 0] = 1.0
    for a, n, row in zip(table.signal, table.noise, table.update, strict=True):
        slope = a * variance / (a**2 * variance + n**2)
        linear, from_d, from_z = row[:, :-2].copy(), row[:, -2], row[:, -1]
        linear[:, 0] += from_d * slope
        first = linear @ first + from_d * (mean - slope * a * mean)
        second = linear @ second @ linear.T + np.outer(from_z, from_z)
    return float(first[0]), float(second[0, 0])
