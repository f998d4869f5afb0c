"""A sampler table holds a fixed-step sampler as a few small arrays.

A sampler is an explicit general linear method with one network call a stage. It holds R registers (images); register
0 is what the network sees, and the sample at the end. The others are 0 at the start, unless the table says otherwise.
Stage i computes

    D  = the denoised estimate of x_0 from register 0 at time t[i]
    R' = update[i] @ [R_0, ..., R_{R-1}, D, z]

with z fresh standard normal noise.

A solver is a function (schedule, tau, options) -> SamplerTable: float64 arithmetic with no loop over images, no state
and no JAX. `diffusion.sample` executes any table with one compiled scan.
"""

import dataclasses
import html
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from diffusion.errors import InputError, is_whole, nearest
from diffusion.solvers.facts import check_facts
from diffusion.solvers.steps import ddim_rows


class _Label:
    """Carries a table's name and facts through a pytree and equals every other label, so that they compile nothing."""

    def __init__(self, name, facts):
        self.name, self.facts = name, facts

    def __eq__(self, other):
        return isinstance(other, _Label)

    def __hash__(self):
        return hash(_Label)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class SamplerTable:
    """A SamplerTable is a sampler as a pytree of arrays, which can be traced, differentiated and stacked.

    Tables of one shape have one structure, whatever their names: another sampler compiles nothing.

    Attributes:
      tau: the grid, [S + 1], descending to 0.
      t: the time given to the network in each stage, [stages].
      signal, noise: a_t and n_t at these times, [stages]; they turn any kind of prediction into D.
      update: [stages, R, R + 2]; columns are the registers, then D, then z.
      name: what to call the sampler.
      log_variance: [stages, 2], logs of the smallest and largest variance of a model that predicts where between them
        its own lies (improved DDPM, arXiv:2102.09672, Eq. 15), or None. z is scaled by it before its column is.
      facts: what it was made for, such as {"prediction": "eps"} of a learned one, see `facts`; {} for a solver's.
      start: [R], what the registers begin with, as multiples of one draw of standard normal noise, see
        `analytic_first`; or None, where register 0 begins with (signal[0]^2 + noise[0]^2)^(1/2) and the others with 0.
    """

    tau: Float[np.ndarray, "S+1"]
    t: Float[np.ndarray, "stages"]
    signal: Float[np.ndarray, "stages"]
    noise: Float[np.ndarray, "stages"]
    update: Float[np.ndarray, "stages R R+2"]
    name: str
    log_variance: Float[np.ndarray, "stages 2"] | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: Float[np.ndarray, "R"] | None = None

    def tree_flatten(self):
        arrays = (self.tau, self.t, self.signal, self.noise, self.update, self.log_variance, self.start)
        return arrays, _Label(self.name, self.facts)

    @classmethod
    def tree_unflatten(cls, label, arrays):
        return cls(*arrays[:5], name=label.name, log_variance=arrays[5], facts=label.facts, start=arrays[6])

    @property
    def nfe(self) -> int:
        """Counts the network calls: one a stage."""
        return self.t.shape[0]

    @property
    def num_registers(self) -> int:
        """Counts the registers: R images, which the scan carries."""
        return self.update.shape[1]

    @property
    def start_std(self) -> Float[np.ndarray, ""]:
        """Returns the standard deviation of the noise that the network sees first."""
        return (self.signal[0] ** 2 + self.noise[0] ** 2) ** 0.5 if self.start is None else self.start[0]

    def reverse(self, iterations: int = 1, rule: str = "new") -> "SamplerTable":
        """Builds the table from samples back to noise; see `reverse`."""
        return reverse(self, iterations, rule)

    def to_json(self) -> str:
        """Writes the table as JSON, every number to the last bit."""
        return to_json(self)

    def __str__(self) -> str:
        """Prints up to 30 stages: time, signal, noise, and the row that makes the next x."""
        title, columns, rows = self._shown()
        lines = [title, f"{'t':>9} {'signal':>9} {'noise':>9} | x' = " + " ".join(f"{c:>9}" for c in columns)]
        for cells in rows:
            cells = [f"{cell:>9}" for cell in cells]
            lines.append(f"{' '.join(cells[:3])} |      {' '.join(cells[3:])}" if len(cells) > 1 else cells[0])
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows a notebook what `__str__` prints, as a table."""
        title, columns, rows = self._shown()
        head = "".join(f"<th>{name}</th>" for name in ("t", "signal", "noise", "x&prime; =", *columns))
        body = ""
        for t, *others in rows:
            cells = [t, *others[:2], "", *others[2:]] if others else [t]
            body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"

    def _shown(self):
        """Returns a title, the names of the columns of a row, and for up to 30 stages the texts to show."""
        columns = [*(f"R{i}" for i in range(self.num_registers)), "D", "z"]
        calls = f"{self.name}: {self.nfe} network calls, {self.num_registers} register(s)"
        title = f"{calls}, tau {self.tau[0]:g} to {self.tau[-1]:g}"
        if self.start is not None:
            title += f"; at the start {', '.join(f'{share:.5f}' for share in self.start)} of the noise"
        rows = []
        for i in range(self.nfe):
            if self.nfe <= 30 or not 15 <= i < self.nfe - 15:
                levels = [f"{self.t[i]:.2f}", f"{self.signal[i]:.5f}", f"{self.noise[i]:.5f}"]
                rows.append([*levels, *(f"{v:.5f}" for v in np.asarray(self.update[i, 0]))])
            elif i == 15:
                rows.append(["..."])
        return title, columns, rows


def make_table(name: str, tau, t, signal, noise, update, log_variance=None, start=None) -> SamplerTable:
    """Checks the arrays of a sampler and puts them into a table, in float64; arguments as SamplerTable's attributes.

    `build` of `diffusion.solvers.forms` calls it for a solver written in stages.

    Raises:
      InputError: an entry is not finite, as where a solver divides by a signal of zero; shapes that do not agree; or a
        name that is no text.
    """
    arrays = [np.asarray(a, np.float64) for a in (tau, t, signal, noise, update)]
    log_variance, start = (None if a is None else np.asarray(a, np.float64) for a in (log_variance, start))
    if not isinstance(name, str):
        raise InputError(f"the name of a table is {name!r}; give a text")
    others = (0.0 if a is None else a for a in (log_variance, start))
    for label, array in zip(_ARRAYS, [*arrays, *others], strict=True):
        if not np.all(np.isfinite(array)):
            stage = int(np.argwhere(~np.isfinite(np.atleast_1d(array)))[0][0])
            raise InputError(f"{name}: {label} is not finite at stage {stage}; this solver cannot take this grid")
    stages, registers, columns = arrays[-1].shape if arrays[-1].ndim == 3 else (0, 0, 0)
    shapes_agree = stages and columns == registers + 2 and all(a.shape == (stages,) for a in arrays[1:4])
    variance_agrees = log_variance is None or log_variance.shape == (stages, 2)
    if not shapes_agree or arrays[0].ndim != 1 or arrays[0].size < 2 or not variance_agrees:
        raise InputError(
            f"{name}: update has shape {arrays[-1].shape}, t {arrays[1].shape}, tau {arrays[0].shape}; "
            "want (stages, R, R + 2), (stages,), (S + 1,)"
        )
    if start is not None and (start.shape != (registers,) or not start[0] > 0):
        raise InputError(f"{name}: start has shape {start.shape}; want ({registers},), and a first entry above 0")
    return SamplerTable(*arrays, name=name, log_variance=log_variance, start=start)


MAX_CALLS = 10**6
"""More network calls than anybody waits for are a slip of the pen, and rows for them would fill the memory."""


def check_calls(name: str, calls: float) -> None:
    """Raises InputError for more network calls than a table may have; for solvers, before they lay out the rows."""
    if calls > MAX_CALLS:
        raise InputError(f"{name} has {calls:,.0f} network calls; give fewer, up to {MAX_CALLS:,}")


def check_memoryless(table: SamplerTable, what: str) -> None:
    """Raises InputError for a table in which no step may be made again, as what it keeps would be of another x.

    Args:
      table: kept are registers, and the variance of the network's own steps.
      what: how the message goes on after "cannot".
    """
    if table.num_registers != 1 or table.log_variance is not None or table.tau[0] < table.tau[-1]:
        raise InputError(
            f"{table.name} cannot {what}; use a table of one register and a fixed variance that goes from noise to "
            "images, as ddim or ddpm"
        )


VERSION = 2
"""Of the JSON form. The first had neither a version nor facts, and is still read."""


def to_json(table: SamplerTable) -> str:
    """Writes a table as JSON, every number to the last bit."""
    arrays = {name: getattr(table, name) for name in _ARRAYS}
    fields = {name: None if array is None else np.asarray(array).tolist() for name, array in arrays.items()}
    if table.start is None:  # as in the files of programs that know no other start
        del fields["start"]
    return json.dumps({"version": VERSION, "name": table.name, "facts": dict(table.facts), **fields})


_ARRAYS = ("tau", "t", "signal", "noise", "update", "log_variance", "start")


TEXT_LIMIT, MAX_REGISTERS, MAX_NAME = 2**24, 64, 1000
"""The most characters of a table in JSON, registers and characters of its name that `from_json` takes from a stranger.

A thousand stages of ten registers have 3 MB of text. The scan is compiled with a sum for each pair of registers.
"""


def from_json(text: str) -> SamplerTable:
    """Reads a table that `to_json` wrote.

    Raises:
      InputError: the text is no table, or larger than any table.
    """
    names = {"version", "facts", "name", *_ARRAYS}
    try:
        if len(text) > TEXT_LIMIT:
            raise ValueError(f"it has {len(text):,} characters")
        fields = json.loads(text)
        if isinstance(fields, dict) and fields.keys() == names - {"version", "facts", "start"}:
            fields |= {"version": 1, "facts": {}}
        if not isinstance(fields, dict) or set(fields) | {"start"} != names:
            raise ValueError(f"it must have the fields {', '.join(sorted(names - {'start'}))} and no other")
        version, facts = fields.pop("version"), fields.pop("facts")
        if version not in (1, VERSION):
            raise ValueError(f"its version is {str(version)[:20]!r}, and this program knows those up to {VERSION}")
        check_facts(facts)
        if not isinstance(fields["name"], str) or not fields["name"].isprintable() or len(fields["name"]) > MAX_NAME:
            raise ValueError(f"its name is no text of up to {MAX_NAME:,} characters that can be printed")
        table = make_table(**fields)
        if table.num_registers > MAX_REGISTERS:
            raise ValueError(f"it has {table.num_registers:,} registers; {MAX_REGISTERS} are the limit")
        return dataclasses.replace(table, facts=facts)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"this is no sampler table in JSON: {' '.join(str(error).split())[:200]}") from None


RULES = ("new", "present")
"""Where `reverse` makes the first call of a step: at the level that the step goes to, or at that where it is."""


def reverse(table: SamplerTable, iterations: int = 1, rule: str = "new") -> SamplerTable:
    """Builds the table that takes samples back to the noise they come from, on the same grid (DDIM inversion).

    A deterministic DDIM step from t to s makes x_s = a_s D + n_s eps, and so its inverse is

        x_t = (a_t / a_s) (x_s - n_s eps) + (x_t - a_t D)

    with D and eps of the unknown x_t. They are taken from the first guess of it, and each further iteration puts the
    last guess in (fixed-point iteration, as in arXiv:2309.04907). The formula also holds where eps is not (x_t - a_t D)
    / n_t, as with the guidance rule "cfg++" and with clip "keep_eps". Run it with the images as x_init, and with the
    prediction, guidance and clip of the way back.

    The iteration approaches the inverse only where the network's answer changes slowly with x. Guidance of scale w
    multiplies that change by about w. With a large w the guesses of a step move apart, and each further iteration makes
    the inverse worse: then take one iteration of rule "present", or rule "cfg++" of guidance, whose scale is small.
    The ways there and back, compared with the images, tell; so do the last two guesses of a step in the trajectory.

    Args:
      table: from `ddim` with eta = 0.
      iterations: network calls a step, at least 1; more invert more exactly where the iteration converges.
      rule: where the first call of a step is made. "new" puts x_s in at the level t that the step goes to. "present"
        asks at s, where x_s belongs, as DDIM's authors do (arXiv:2010.02502, section 4.3); further iterations then
        begin with a better guess. The first step, from images without noise, asks at t with either.

    Raises:
      InputError: the table is of another kind, starts at zero signal, iterations is below 1, or an unknown rule.
    """
    if not is_whole(iterations) or iterations < 1:
        raise InputError(f"iterations is {iterations}; it must be a whole number of at least 1")
    if rule not in RULES:
        raise InputError(f"rule is {rule!r}; {nearest(str(rule), RULES)}")
    levels_t = np.stack([np.asarray(v)[::-1] for v in (table.t, table.signal, table.noise)], axis=-1)
    _, signal_t, noise_t = levels_t.T
    # A step here goes from s up to t, the last step of the table first. Only deterministic DDIM has the expected rows.
    signal_s, noise_s = np.append(1.0, signal_t[:-1]), np.append(0.0, noise_t[:-1])
    row = np.asarray(table.update)[::-1, 0]
    expected = ddim_rows(signal_t, noise_t, signal_s, noise_s)
    is_ddim = table.num_registers == 1 and table.start is None and np.allclose(row, expected, rtol=0, atol=1e-10)
    if not is_ddim or np.any(signal_t == 0):
        raise InputError(f"{table.name} cannot be reversed; use ddim with eta 0, from a time with some signal")
    # Registers: the guess of x_t, which the network sees; the same, as it was before guidance or clipping moved it; and
    # x_s. All three are x_s when a step begins, but the very first finds the images in register 0 alone.
    seen, *others, D, _ = np.eye(5)
    asked, updates = [], []
    for i, (grow, a_s, n_s, a_t, n_t) in enumerate(
        zip(signal_t / signal_s, signal_s, noise_s, signal_t, noise_t, strict=True)
    ):
        for k in range(int(iterations)):
            here = i - 1 if rule == "present" and k == 0 and i > 0 else i
            a, n = (a_s, n_s) if here < i else (a_t, n_t)
            guess, x_s = (seen, seen) if i == k == 0 else others
            # The noise of the guess by D, and the noise that the solver goes on with.
            of_guess, eps = (guess - a * D) / n, (seen - a * D) / n
            x_t = grow * (x_s - n_s * eps) + n_t * of_guess
            asked.append(here)
            updates.append([x_t, x_t, x_t if k == iterations - 1 else x_s])
    name = f"reverse {table.name}" + (", present" if rule == "present" else "")
    return make_table(name, np.asarray(table.tau)[::-1], *levels_t[asked].T, np.array(updates))
