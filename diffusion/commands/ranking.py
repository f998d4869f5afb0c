"""Ranks samplers on a model of the user's own, for evaluate.py: which loses least at a budget of network calls."""

import csv
import io
import shlex
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from tqdm import tqdm

from diffusion import devices, files, keys, options
from diffusion.commands import (
    aliases,
    batching,
    drawing,
    learned,
    own,
    rollouts,
    samplers,
    shared_flags,
    students,
    usage,
)
from diffusion.commands.ranked import Ranked
from diffusion.commands.samplings import make_sampling
from diffusion.commands.sources import Source
from diffusion.errors import InputError
from diffusion.evaluation import ranking
from diffusion.evaluation.ranking import Candidate, Row
from diffusion.solvers import SamplerTable
from diffusion.timesteps import GRIDS, MODEL_GRIDS

SOLVER, STEPS = "unipc:order=3", 500
"""What the samples are compared with: this solver on the uniform grid, or as many steps as the model has."""

FIRST, SHARE, AT_LEAST = 16, 0.25, 40
"""All samplers are run on so many noises, and of these the best quarter, or at least so many, on the others too."""

NOISES, SHOWN, EVERY = 64, 10, 15.0
"""How many noises there are by default, how many samplers are printed, and seconds between two words on progress."""

NAME = "ranking.csv"

_COLUMNS = ("run", "checkpoint_step", "budget", "place", "sampler", "tau", "steps", "calls", "rms", "median", "noises")


class Plan(NamedTuple):
    """What is ranked.

    Attributes:
      source: the model, and how it is asked.
      budgets: numbers of network calls.
      samplers: the only ones that are ranked, or None for all.
      grids: on which they are.
      num: how many noises they are compared on.
      batch_size: of these, how many go through the network together.
    """

    source: Source
    budgets: tuple[int, ...]
    samplers: tuple[str, ...] | None
    grids: tuple[str, ...]
    num: int
    batch_size: int


def plan(source: Source, calls: Sequence[str], names: Sequence[str] | None, tau: str | None, num: int | None) -> Plan:
    """Returns what the flags ask for.

    Args:
      source: the model.
      calls: the budgets, as text.
      names: the samplers of the user, or None for all.
      tau: the grid of the user, or None for all.
      num: how many noises; None for `NOISES`.

    Raises:
      InputError: a number out of its range, or a model whose samples follow no equation that many steps would solve.
    """
    students.check_is_denoiser(source.trained.config, "--rank")
    if source.guidance.rule.partition(":")[0] == "cfg++" and source.guidance.acts():
        raise InputError(
            "--rank compares with a solution in many steps, and rule cfg++ has none: the more steps, the further it "
            "pushes; take another rule"
        )
    schedule = source.trained.model.schedule
    budgets = samplers.parse_calls(calls, schedule.num_timesteps)
    chosen = None if names is None else tuple(_checked(aliases.without_grid(name, say=True)) for name in names)
    grids = ranking.GRIDS
    if tau is not None:
        grids = (aliases.grid(tau),)
        if options.parse("tau", grids[0], samplers.TAUS, leading=1).name not in GRIDS | MODEL_GRIDS:
            raise InputError(f"--rank tries numbers of steps, which tau {tau} cannot have; name a grid, as uniform")
        samplers.make_tau(schedule, grids[0], min(budgets))
    num = num or NOISES
    size = batching.fixed(flags.FLAGS.batch_size, "a ranking")
    return Plan(source, budgets, chosen, grids, num, min(FIRST, num, size))


def _checked(sampler):
    """Returns a sampler that the user names; refuses a name or an option that is not known."""
    if samplers.is_file(sampler):
        raise InputError(
            f"{sampler} is a table in a file, and --rank tries solvers on grids; the table that learn.py has learned "
            "for the model is ranked with them"
        )
    if samplers.is_own(sampler):
        options.parse_own("sampler", sampler, own.load("sampler", sampler), ("schedule", "tau"))
    elif sampler != learned.LEARNED:
        options.parse("sampler", sampler, samplers.SAMPLERS, leading=2)
    return sampler


def rank(asked: Plan, out: Path) -> None:
    """Prints the best samplers of each budget with the command that uses the first, and writes all to ranking.csv.

    Args:
      asked: from `plan`.
      out: the folder of the file.

    Raises:
      InputError: a sampler that draws noise, or none that keeps to a budget; a folder that cannot be written.
    """
    # What cannot work is found before the solution, which takes a while.
    entries = {budget: _entries(asked, budget) for budget in asked.budgets}
    with files.locked(out, "measuring into", ".evaluation.lock"):
        files.remove_temporaries(out, r"ranking\.(csv|rows\.jsonl|solution\.npz)", out)
        if (out / NAME).is_dir():
            raise InputError(f"{out / NAME} is a folder; move it away, or name another --out")
        source, model = asked.source, asked.source.trained.model
        print(f"{source.title()}: samplers ranked on {asked.num} noises")
        if asked.samplers is None:
            left = [name for name, why in ranking.LEFT_OUT.items() if why == "stochastic"]
            print(f"left out, as no distance to a solution says how good samples with new noise are: {', '.join(left)}")
        mesh = devices.data_mesh()
        everywhere = NamedSharding(mesh, PartitionSpec())
        how = source.sampling_options() | {"key": rollouts.key_of(source.seed, "rank"), "labels": source.labels}
        draw = partial(drawing.draw, model, jax.device_put(source.trained.params, everywhere), mesh=mesh, **how)
        ranked = Ranked(out, _facts(asked))
        if len(ranked):
            print(f"{len(ranked):,} rows are there already")
        solution = _solution(asked, draw, ranked)
        rows: list[dict[str, Any]] = []
        for budget in asked.budgets:
            best = _best(asked, draw, entries[budget], solution, budget, ranked)
            _print(source, best, budget)
            rows += [_record(source, budget, place, row) for place, row in enumerate(best, 1)]
            files.write_atomically(out / NAME, _as_csv(rows), out)
        ranked.remove()
    print(f"wrote {out / NAME}")


def _entries(asked, budget):
    """Returns the candidates of a budget, the learned table of the model among them."""
    source = asked.source
    model, resources = source.trained.model, source.resources()

    def make(sampler: str, tau: str, steps: int) -> SamplerTable:
        table = samplers.make_table(model.schedule, sampler, steps, tau, resources=resources)
        samplers.check_fits(table, model)
        if source.guidance.acts():
            source.guidance.scales(table.t)  # refuses an interval that holds none of these times
        return table

    found = ranking.candidates(make, budget, asked.samplers, asked.grids)
    if asked.samplers is None or learned.LEARNED in asked.samplers:
        found += list(_learned(source, budget))
    if not found and set(asked.samplers or ()) == {learned.LEARNED}:
        learned.find(source.opened, budget, source.guidance)  # says how to learn one
    if not found:
        raise InputError(f"no sampler on these grids takes {budget} network calls or fewer; give more --calls")
    return found


def _learned(source: Source, budget: int) -> Iterator[Candidate]:
    """Yields the table that was learned for the model and the budget, if there is one."""
    if not learned.paths_of(source.opened, budget, source.guidance, source.weaker):
        return
    sampling = make_sampling(source, learned.LEARNED, budget, "")
    yield Candidate(learned.LEARNED, "", budget, sampling.table)
    for note in learned.notes(sampling.table, source.facts()):
        print(f"note: {note}")


def _facts(asked):
    """Returns what determines the rows of a ranking besides their tables."""
    source = asked.source
    from_noise = {"seed": source.seed, "generator": keys.GENERATOR, "labels": list(source.labels), "num": asked.num}
    return {"weights_sha256": source.sha256, "solver": SOLVER, "steps": STEPS, **source.settings, **from_noise}


def _solution(asked, draw, ranked) -> Float[np.ndarray, "N *shape"]:
    """Returns the samples of many steps, and says how near they are to those of half as many."""
    source, began = asked.source, time.perf_counter()
    most = min(STEPS, source.trained.model.schedule.num_timesteps)

    def samples(steps):
        table = make_sampling(source, SOLVER if steps > 2 else "ddim", steps, "uniform").table
        parts = []
        with tqdm(total=asked.num, unit="image", desc=f"{steps} steps", leave=False, disable=None) as progress:
            for part in draw(table, range(asked.num), batch_size=asked.batch_size):
                parts.append(part)
                progress.update(len(part))
        return np.concatenate(parts)

    found = ranked.solution(lambda: (samples(max(1, most // 2)), samples(most)))
    if not np.isfinite(found[1]).all():
        raise InputError("the samples in many steps are not finite: the weights have diverged; take another checkpoint")
    apart = float(np.sqrt(ranking.squares(*found).mean()))
    print(
        f"compared with {SOLVER} in {most} steps, from which {most // 2} steps are {apart:.1e} away: nearer than that "
        f"tells samplers no more apart ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    return found[1]


def _best(asked, draw, entries, solution, budget, ranked) -> list[Row]:
    """Returns the rows, the best first: those that were run on all noises come before the others."""
    first = min(FIRST, asked.num)

    def rows(entries, ids, what):
        def run(table):
            return np.concatenate(list(draw(table, ids, batch_size=asked.batch_size)))

        known = [(entry, ranked.squares(entry.table, ids)) for entry in entries]
        yield from (Row(entry, squares) for entry, squares in known if squares is not None)
        left = [entry for entry, squares in known if squares is None]
        with _Progress(f"{budget} calls, {what}", sum(entry.table.nfe for entry in left)) as progress:
            for row in ranking.rank(run, left, solution[ids.start : ids.stop]):
                ranked.add(row.candidate.table, ids, row.squares)
                progress.advance(row.candidate.table.nfe)
                yield row

    found = sorted(rows(entries, range(first), f"{len(entries):,} samplers"), key=lambda row: row.rms)
    if asked.num == first:
        return found
    kept = max(AT_LEAST, round(SHARE * len(found)))
    before = {id(row.candidate): row for row in found[:kept]}
    more = rows([row.candidate for row in found[:kept]], range(first, asked.num), f"the best {min(kept, len(found))}")
    whole = [row._replace(squares=np.append(before[id(row.candidate)].squares, row.squares)) for row in more]
    return sorted(whole, key=lambda row: row.rms) + found[kept:]


class _Progress:
    """Shows how far a round is, with its pace and the time left: a bar, or lines where there is no terminal."""

    def __init__(self, what: str, calls: int):
        self._what, self._calls = what, calls
        self._bar = tqdm(total=calls, unit="call", desc=what, leave=False, disable=None)

    def __enter__(self):
        self._done, self._began = 0, time.perf_counter()
        self._said = self._began
        return self

    def advance(self, calls: int) -> None:
        self._done += calls
        self._bar.update(calls)
        now = time.perf_counter()
        if self._bar.disable and now - self._said > EVERY:
            self._said, pace = now, self._done / (now - self._began)
            left = (self._calls - self._done) / pace
            print(f"{self._what}: {self._done / self._calls:.0%}, {pace:.0f} calls/s, {left:.0f} s left", flush=True)

    def __exit__(self, *_):
        self._bar.close()


def _print(source, ranked, budget):
    """Prints the best samplers, and how to use the first."""
    print(f"\n{budget} calls: the best of {len(ranked):,}")
    print(f"{'':3}{'sampler':58} {'tau':20} {'steps':>5} {'calls':>5} {'RMS':>9} {'median':>9}")
    for place, row in enumerate(ranked[:SHOWN], 1):
        entry = row.candidate
        print(
            f"{place:2} {entry.sampler:58} {entry.tau:20} {entry.steps:5} {entry.table.nfe:5} {row.rms:9.2e} "
            f"{row.median:9.2e}"
        )
    print(f"use the first: {' '.join(_command(source, ranked[0].candidate))}", flush=True)


def _command(source, entry):
    """Returns the command that draws with a candidate."""
    named = [f"--sampler={entry.sampler}", f"--steps={entry.steps}"] + [f"--tau={entry.tau}"] * bool(entry.tau)
    return ["python", usage.called("sample"), *shared_flags.as_asked(), *map(shlex.quote, named)]


def _record(source, budget, place, row):
    """Returns a row of the file."""
    entry = row.candidate
    values = (source.name, source.trained.step, budget, place, entry.sampler, entry.tau, entry.steps, entry.table.nfe)
    found = dict(zip(_COLUMNS, (*values, row.rms, row.median, len(row.squares)), strict=True))
    return found | {"seed": source.seed, "weights_sha256": source.sha256, **source.settings}


def _as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
