"""Learns samplers of few steps for a trained model: `python learn.py --workdir=runs/cifar --calls=5`.

A sampler is a table of a few numbers, so learning one is a small least-squares problem: its samples are brought close
to those that a hand-made solver draws with many calls from the same noise. It takes about a minute for a small network
and needs no data. The tables go to tables/ in the run folder, and `python sample.py --sampler=learned --steps=5` uses
them. A table is kept only if it beats every hand-made sampler on noise that it was not learned from. The same command
goes on where it was cut off, and leaves tables that are there already.
"""

import csv
import io
import json
import time

import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion import devices, files, sealed
from diffusion.commands import (
    cli,
    learned,
    losses,
    prompts,
    rollouts,
    samplers,
    samplings,
    shared_flags,
    sources,
    students,
    usage,
)
from diffusion.errors import InputError, nearest
from diffusion.learning import searches, tables
from diffusion.learning.family import SCOPES
from diffusion.solvers import ESTIMATED_SOLVERS
from diffusion.solvers.history import from_table, to_table

shared_flags.define_source_flags(draws=False)
usage.group("What is learned, and from what")
_CALLS = flags.DEFINE_list("calls", ["5"], "Network calls of each table to learn, as 3,4,5,6,8,10.")
_SCOPE = flags.DEFINE_string("scope", "all", f"What of a sampler is learned: {', '.join(SCOPES)}.")
_TEACHER = flags.DEFINE_string("teacher", "unipc:order=3", "The solver whose samples are the goal; deterministic.")
_TEACHER_CALLS = flags.DEFINE_integer("teacher_calls", 64, "Steps of the teacher.", lower_bound=2)
_LOSS = flags.DEFINE_string(
    "loss",
    "log",
    "How samples are compared with the teacher's: log:floor=0.001, where a squared error of floor counts as reached; "
    "mse; l1, for latents; or features:space=classifier, of a network that is trained on the run's data.",
)
_NOISES = flags.DEFINE_integer("noises", 128, "Noises to learn from, and as many to judge by.", lower_bound=8)
_AGAIN = flags.DEFINE_bool("again", False, "Learn a table anew although there is one.")


def main() -> None:
    devices.prepare()
    source = sources.open_source()
    students.check_is_denoiser(source.trained.config, "learn.py")
    calls = samplers.parse_calls(_CALLS.value, min(tables.MAX_CALLS, source.trained.model.schedule.num_timesteps))
    if _SCOPE.value not in SCOPES:
        raise InputError(f"scope is {_SCOPE.value!r}; {nearest(_SCOPE.value, SCOPES)}")
    teacher, loss = _teacher(source), losses.parse(_LOSS.value)
    folder = source.home / learned.FOLDER
    for count in calls:
        _check_places(source, folder, count)
    wanted = [count for count in calls if _AGAIN.value or not _is_done(source, folder, count)]
    if not wanted:
        return
    compared = loss.function(source.trained, **loss.options)  # before anything is written, as it may be refused
    files.make_folder(folder, source.home)
    with files.locked(folder, "learning tables in", ".learning.lock"):
        files.remove_temporaries(folder, r".*\.(json|csv)", folder)
        print(f"{source.name}, step {source.trained.step:,}: learning tables of {', '.join(map(str, wanted))} calls")
        bed = _make_bed(source, teacher, compared)
        for count in wanted:
            _learn(source, bed, folder, count)


def _teacher(source):
    """Returns the teacher as a history; its table must be deterministic and fit the model."""
    model = source.trained.model
    if samplers.is_file(_TEACHER.value) or _TEACHER.value == learned.LEARNED:
        raise InputError("teacher names a table; name a solver, as unipc:order=3, and its steps with --teacher_calls")
    if _TEACHER.value.partition(":")[0] in ESTIMATED_SOLVERS:
        raise InputError(f"teacher is {_TEACHER.value}, which draws noise at every step; take unipc:order=3")
    if _TEACHER_CALLS.value > (most := model.schedule.num_timesteps):
        raise InputError(f"teacher_calls is {_TEACHER_CALLS.value}; this model has {most} timesteps: give 2..{most}")
    sampling = samplings.make_sampling(source, _TEACHER.value, _TEACHER_CALLS.value, "uniform")
    try:
        return from_table(sampling.table)
    except InputError as error:
        raise InputError(f"teacher: {error}; {model.prediction} models can take unipc:order=3") from None


def _places(source, folder, count):
    """Returns the paths of a table, of the losses of its search, and of a search that is not at its end."""
    path = folder / learned.name_of(count, source.guidance, source.weaker)
    return path, path.with_suffix(".csv"), folder / f".{path.stem}.search.json"


def _check_places(source, folder, count):
    """Refuses what could not be replaced after the work."""
    for path in _places(source, folder, count):
        files.refuse_links(path, source.home)
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file; move it away")


def _is_done(source, folder, count):
    """Says whether there is a table of so many calls that was learned for this model as it is now."""
    path = _places(source, folder, count)[0]
    if not path.exists():
        return False
    facts = learned.read_table(path).facts
    if others := [name for name, value in _facts(source).items() if facts.get(name) != value]:
        print(f"note: {path} was learned with other {', '.join(others)}; a new table replaces it")
        return False
    print(f"{path} is there already; --again learns it anew")
    return True


def _facts(source):
    """Returns everything that determines a table."""
    settings = {"scope": _SCOPE.value, "teacher": _TEACHER.value, "teacher_calls": _TEACHER_CALLS.value}
    settings |= {"noises": _count(source), "loss": losses.spelled_out(losses.parse(_LOSS.value))}
    settings |= {"seed": source.seed, "labels": list(source.labels), **prompts.settings(source.trained.model)}
    return {**source.facts(), **settings}


def _batch_size(source):
    return rollouts.batch_size(source.trained.model, flags.FLAGS.batch_size)


def _count(source):
    """Returns how many noises are learned from: full batches of them."""
    size = _batch_size(source)
    return -(-_NOISES.value // size) * size


def _make_bed(source, teacher, loss):
    """Draws the noises, and has the teacher make samples of them."""
    model, key = source.trained.model, rollouts.key_of(source.seed, "tabl")
    size, count = _batch_size(source), _count(source)
    train, held = (
        rollouts.batches(model, source.guidance, source.labels, key, range(first, first + count), size)
        for first in (0, count)
    )
    asked = rollouts.asked(source.trained, source.settings, source.guidance)
    began = time.perf_counter()
    with tqdm(total=2 * count, unit="image", desc="teacher", leave=False, disable=None) as progress:
        parts = (asked, model.schedule, teacher, train, held, loss)
        bed = tables.make_bed(*parts, tick=lambda: progress.update(size))
    print(
        f"teacher: {_TEACHER.value}, {teacher.nfe} calls, {count} noises to learn from and {count} to judge by "
        f"({time.perf_counter() - began:.0f} s)"
    )
    return bed


def _learn(source, bed, folder, count):
    """Learns one table, goes on with a search that was cut off, and writes what it has found."""
    *_, unfinished = places = _places(source, folder, count)
    identity = {"calls": count, **_facts(source)}
    began = time.perf_counter()
    search = _resume(unfinished, identity, bed, folder)
    if search is None:
        with tqdm(unit="sampler", desc=f"{count} calls: hand-made", leave=False, disable=None) as progress:
            search = tables.begin(bed, count, SCOPES[_SCOPE.value], tick=progress.update)
    else:
        print(f"{count} calls: going on after {search.iterations} iterations")
    best = search.trials[0]
    print(f"{count} calls: best hand-made {best.start[0]} on {best.start[1]}, held-out loss {search.hand_made:.3f}")
    compiled, made = None, 0  # when the first iteration, which compiles, was over, and how many were made since then
    while search.current is not None:
        number, started = search.current, time.perf_counter()
        search = tables.advance(bed, search)
        sealed.write(unfinished, {"identity": identity, **searches.to_record(search)}, folder)
        trial, now = search.trials[number], time.perf_counter()
        loss, held_loss = trial.losses[-1]
        compiled, made = (now, 0) if compiled is None else (compiled, made + 1)
        left = f", about {(now - compiled) / made * tables.iterations_left(search):.0f} s left" if made else ""
        print(
            f"  from {trial.start[0]} on {trial.start[1]}, iteration {trial.iterations}: loss {loss:.3f}, held-out "
            f"{held_loss:.3f}  {now - started:.1f} s, {now - began:.0f} s so far{left}",
            flush=True,
        )
    _finish(source, bed, search, places, folder)
    files.remove(unfinished, folder)


def _resume(path, identity, bed, folder):
    """Returns the search that was cut off, or None where there is none of the same settings."""
    if not path.exists():
        return None
    try:
        record = sealed.read(path, within=folder)
        if json.dumps(record.pop("identity"), sort_keys=True) == json.dumps(identity, sort_keys=True):
            search = searches.from_record(record)
            searches.check(search, bed, identity["calls"], SCOPES[identity["scope"]])
            return search
    except (InputError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        pass
    print(f"note: {path} is of other settings or damaged; the search starts anew")
    return None


def _finish(source, bed, search, places, folder):
    """Writes the table with its curve if it beats the hand-made samplers, and says by how much."""
    path, curves, _ = places
    if search.leader.best_loss >= search.hand_made:
        stays = f"; {path} was learned before and stays as it was" if path.exists() else ""
        print(f"{search.calls} calls: nothing beat the best hand-made sampler on held-out noise: no table{stays}")
        return
    history = tables.result(bed, search)
    solver, grid = search.leader.start
    ratio = tables.error_ratio(search)
    facts = {**_facts(source), "from": f"{solver} on {grid}", "held_out": search.leader.best_loss}
    facts["held_out_curve"] = [held_loss for _, held_loss in search.leader.losses if np.isfinite(held_loss)]
    table = to_table(history, f"{learned.LEARNED}({search.calls} calls)", facts)
    files.write_atomically(path, table.to_json().encode(), folder)
    files.write_atomically(curves, _curves(search).encode(), folder)
    print(table)
    drawing = [
        "python",
        usage.called("sample"),
        *shared_flags.as_asked(),
        f"--sampler={learned.LEARNED}",
        f"--steps={search.calls}",
    ]
    print(
        f"{search.calls} calls: the typical error on held-out noise is {ratio:.3f} of the best hand-made "
        f"sampler's; wrote {path}; draw with: {' '.join(drawing)}"
    )


def _curves(search):
    """Returns the losses of each trial as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["solver", "grid", "iteration", "loss", "held_out_loss"])
    for trial in search.trials:
        writer.writerows([*trial.start, number, *losses] for number, losses in enumerate(trial.losses))
    return text.getvalue()


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
