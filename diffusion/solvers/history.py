"""The history form of a table: every deterministic sampler with one network call a stage, in the fewest numbers.

Each x that such a sampler makes is linear in the x before it and in all denoised estimates so far,

    x_{i+1} = keep_i x_i + sum_{j <= i} weights_ij D_j,        D_j = D(x_j) at the level of stage j,

whatever its registers hold on the way. `from_table` computes these numbers from any table, and `to_table` makes a table
of them with as few registers as the weights need. This is the form in which samplers are learned.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from diffusion.errors import InputError
from diffusion.solvers.table import SamplerTable, make_table

Numbers = Float[np.ndarray, "..."] | Float[Array, "..."]


class History(NamedTuple):
    """A History holds a sampler as x_{i+1} = keep_i x_i + sum_j weights_ij D_j; all arrays have float64 numbers.

    Attributes:
      tau: the grid, [S + 1].
      t: the time given to the network in each stage, [stages].
      signal, noise: a and n with which its answer there is read as D, [stages].
      keep: [stages].
      weights: [stages, stages], 0 above the diagonal.
    """

    tau: Numbers
    t: Numbers
    signal: Numbers
    noise: Numbers
    keep: Numbers
    weights: Numbers

    @property
    def nfe(self) -> int:
        """Counts the network calls: one a stage."""
        return self.t.shape[-1]


def from_table(table: SamplerTable) -> History:
    """Returns the history form of a deterministic table.

    Clip "keep_eps" and guidance rule "cfg++" move the x that solvers of the eps basis put into their registers; with
    them the form of such a solver is another sampler than its table. With every other choice it is the same one.

    Raises:
      InputError: the table draws noise or takes its variance from the network, has an analytic first step, or keeps an
        earlier x after a stage that makes x without the x before it.
    """
    update = np.asarray(table.update, np.float64)
    stages, registers, _ = update.shape
    if table.log_variance is not None or np.any(update[:, :, -1]):
        raise InputError(f"{table.name} draws noise at every step; only deterministic samplers have a history form")
    if table.start is not None:
        raise InputError(f"{table.name} makes its first step without a call and has no history form; leave out the AFS")
    # Each register as a linear form in the present x, which comes first, and in D_0, D_1, ....
    forms = np.zeros((registers, 1 + stages))
    forms[0, 0] = 1
    keep, weights = np.zeros(stages), np.zeros((stages, stages))
    for i in range(stages):
        estimate = np.zeros(1 + stages)
        estimate[1 + i] = 1
        forms = update[i, :, :registers] @ forms + update[i, :, registers, None] * estimate
        keep[i], weights[i] = forms[0, 0], forms[0, 1:]
        # What the other registers hold of the old x is said in terms of the new one.
        share, forms[:, 0] = forms[:, 0].copy(), 0
        share[0] = 0
        if np.any(share):
            if keep[i] == 0 and i < stages - 1:
                raise InputError(f"{table.name} keeps an x that the next x does not depend on; it has no history form")
            share = share / keep[i] if keep[i] else share
            forms[:, 1:] -= share[:, None] * weights[i]
            forms[:, 0] = share
        forms[0] = 0
        forms[0, 0] = 1
    return History(*(np.asarray(v, np.float64) for v in (table.tau, table.t, table.signal, table.noise)), keep, weights)


def to_table(history: History, name: str, facts: Mapping[str, Any] = MappingProxyType({})) -> SamplerTable:
    """Returns the table of a history, whose registers are x and each D for as long as a later stage asks for it.

    Raises:
      InputError: a number is not finite.
    """
    weights, stages = np.asarray(history.weights, np.float64), history.nfe
    # The last stage that asks for each D, and a register for it until then.
    last = [max(np.flatnonzero(weights[:, j]), default=j) for j in range(stages)]
    place: dict[int, int] = {}
    rows = []
    for i in range(stages):
        now = dict(place)
        place = {j: register for j, register in place.items() if last[j] > i}
        if last[i] > i:
            place[i] = next(r for r in range(1, stages + 1) if r not in place.values())
        rows.append((now, place))
    registers = 1 + max((max(after.values(), default=0) for _, after in rows), default=0)
    update = np.zeros((stages, registers, registers + 2))
    for i, (now, after) in enumerate(rows):
        update[i, 0, 0], update[i, 0, registers] = history.keep[i], weights[i, i]
        for j, register in now.items():
            update[i, 0, register] = weights[i, j]
        for j, register in after.items():
            update[i, register, registers if j == i else now[j]] = 1
    table = make_table(name, history.tau, history.t, history.signal, history.noise, update)
    return dataclasses.replace(table, facts=facts)
