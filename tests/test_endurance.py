"""What programs survive: kills at chosen operations, damaged and hostile files, any value, and streams that go away.

`make reliability` runs the long versions and prints their counts; `make test` runs a short one of each.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import damages
import numpy as np
import option_values
import pytest
from commands import TINY, digest, saved_steps, shared_cache
from forked import Programs

LONG = pytest.mark.reliability


@pytest.fixture
def report(capsys):
    """Prints a line that pytest does not hide."""

    def report(line):
        with capsys.disabled():
            print(f"\n  {line}", flush=True)

    return report


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The process in whose forks all programs run, with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    with Programs({**shared_cache(home / "compiled"), "XDG_CACHE_HOME": str(home), "HOME": str(home)}) as programs:
        yield programs


class Command(NamedTuple):
    """A command line, and what it is for: folder -> the result, which must be the same whatever happened on the way."""

    program: str
    args: tuple[str, ...]
    result: Callable[[Path], Any]


def training(folder: str, *args: str, last: int) -> Command:
    def result(cwd):
        assert saved_steps(cwd / folder)[-1] == last
        return digest(cwd / folder, last), (cwd / folder / "metrics.csv").read_bytes()

    return Command("train", (*TINY, f"--workdir={folder}", f"--config.train.num_steps={last}", *args), result)


def drawing(out: str, *args: str) -> Command:
    def result(cwd):
        arrays = {}
        for path in sorted((cwd / out).glob("*.npz")):
            with np.load(path) as archive:
                arrays |= {f"{path.name}/{name}": archive[name].tolist() for name in archive.files}
        pictures = [path.read_bytes() for path in sorted((cwd / out).glob("png/*.png"))]
        return arrays, pictures, (cwd / out / "grid.png").read_bytes()

    return Command("sample", (f"--out={out}", *args), result)


def measuring(out: str, *args: str) -> Command:
    def result(cwd):
        rows = json.loads((cwd / out / "evaluation.json").read_text())["rows"]
        table = (cwd / out / "evaluation.csv").read_text().splitlines()
        assert len(table) == len(rows) + 1
        return [(row["identity"], row["metrics"]) for row in rows]

    return Command("evaluate", (f"--out={out}", "--features=pixels", "--num=65", *args), result)


def converting(out: str, *args: str) -> Command:
    return Command("convert", (f"--out={out}", *args), lambda cwd: (cwd / out).read_bytes())


SAVES = ("--config.train.log_every=1", "--config.train.save_every=2", "--config.train.grid_every=100000")
MADE = (
    training("run", *SAVES, "--config.train.keep=2", last=4),
    drawing("run/samples/one", "--workdir=run", "--num=4", "--steps=2", "--png"),
    drawing("run/samples/many", "--workdir=run", "--num=1001", "--steps=1"),
    measuring("run", "--workdir=run", "--steps=1"),
    converting("run/model.safetensors", "--workdir=run"),
)
"""What makes the folder that is killed in and damaged: a run with samples, figures and a weights file."""


@pytest.fixture(scope="module")
def made(programs, tmp_path_factory):
    """A folder in which the commands of `MADE` have run, with the folder `outside` beside the run."""
    cwd = tmp_path_factory.mktemp("made")
    for program, args, _ in MADE:
        outcome = programs.run(program, args, cwd, 300)
        assert outcome.code == 0, outcome.err
    damages.make_outside(cwd)
    return cwd


def without_options(command):
    return f"{command.program} {' '.join(arg for arg in command.args if not arg.startswith('--config.'))}"


# Kills

KILLED = {
    training("killed", *SAVES[:2], "--config.train.keep=1", "--config.train.keep_best=1", last=6): 14,
    drawing("run/samples/new", "--workdir=run", "--num=1001", "--steps=2", "--npz"): 8,
    drawing("run/samples/one", "--workdir=run", "--num=4", "--steps=2", "--seed=1", "--gif", "--png"): 6,
    measuring("run", "--workdir=run", "--steps=1,2"): 6,
    measuring("figures", "--workdir=run", "--steps=2", "--samplers=ddpm"): 2,
    converting("run/model.safetensors", "--workdir=run", "--step=2"): 4,
}
"""Commands, and how often each is killed in all."""


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=LONG)])
def test_a_program_killed_at_any_operation_on_files_ends_in_the_same_when_it_runs_again(
    tmp_path, programs, made, report, kills
):
    todo = KILLED if kills == sum(KILLED.values()) else dict.fromkeys([*KILLED][:kills], 1)
    count, faults = 0, []
    for number, (command, times) in enumerate(todo.items()):
        whole = tmp_path / f"whole{number}"
        shutil.copytree(made, whole)
        seen = programs.run(*command[:2], whole, 300, watch=str(whole))
        assert seen.code == 0, seen.err
        wanted = command.result(whole)
        for turn in range(times):
            cwd = tmp_path / f"{number}-{turn}"
            shutil.copytree(made, cwd)
            at = max(1, round(seen.operations * (turn + 1 + (times == 1)) / (times + 1 + (times == 1))))
            killed = programs.run(*command[:2], cwd, 300, watch=str(cwd), kill_at=at)
            again = programs.run(*command[:2], cwd, 300)
            what = f"{without_options(command)}, killed at operation {at} of {seen.operations}"
            count += killed.code == -9
            left = [str(path.relative_to(cwd)) for path in cwd.rglob("*") if is_temporary(path)]
            if killed.code not in (-9, 0) or again.code != 0:
                faults.append(f"{what}: {killed.code}, then {again.code}: {again.err[-300:]}")
            elif command.result(cwd) != wanted:
                faults.append(f"{what}: another result")
            elif left:
                faults.append(f"{what}: left {left}")
            shutil.rmtree(cwd)
    assert count >= 0.9 * kills, "operations are not where they were counted"
    report(f"kills: {count} at chosen operations over {len(todo)} commands, {len(faults)} broken")
    assert not faults, "\n".join(faults)


def is_temporary(path):
    return any(part in path.name for part in ("unfinished", "orbax-checkpoint-tmp", ".tmp"))


# Damages

ON_DAMAGED = {
    "train": training("run", *SAVES, "--config.train.keep=2", last=6),
    "sample": MADE[1],
    "sample in shards": MADE[2],
    "sample from the weights file": drawing(
        "run/samples/file", "--workdir=run/model.safetensors", "--num=4", "--steps=2"
    ),
    "evaluate": measuring("run", "--workdir=run", "--steps=1,2"),
    "convert": MADE[4],
}
SOME = [
    ("run/metrics.csv", "a flipped bit", "train"),
    ("run/.lock", "a link to a file outside", "train"),
    ("run/checkpoints/4/manifest.json", "cut in half", "convert"),
    ("run/samples/many/samples-00001-of-00002.npz", "a flipped bit", "sample in shards"),
    ("run/evaluation.json", "other JSON", "evaluate"),
    ("run/model.safetensors", "a flipped bit", "sample from the weights file"),
]
"""Damages that different code must find."""


def cases(folder, count):
    """Returns `count` of all damages of all files and folders under all programs, in random order."""
    places = [path for path in damages.entries(folder) if path.parts[0] == "run"]
    kinds = [(path, damages.OF_FOLDERS if (folder / path).is_dir() else damages.OF_FILES) for path in places]
    every = [(path, name, program) for (path, names) in kinds for name, program in product(names, ON_DAMAGED)]
    return random.Random(0).sample(every, count)


def is_named(path, text):
    """Whether a program has told of a file, by its name, its folder's, or the step whose checkpoint it is of."""
    of_step = path.parts[:3] if path.parts[1:2] == ("checkpoints",) else path.parts
    return path.name in text or "/".join(of_step) in text or "/".join(path.parts[:2]) in text


@pytest.mark.parametrize("number", [6, pytest.param(300, marks=LONG)])
def test_what_is_damaged_in_a_run_folder_is_named_or_makes_no_difference(tmp_path, programs, made, report, number):
    todo = SOME if number == len(SOME) else cases(made, number)
    wanted, ends, faults = {}, Counter(), []
    for case, (place, name, program) in enumerate(todo):
        if program not in wanted:
            whole = tmp_path / program.replace(" ", "-")
            shutil.copytree(made, whole)
            outcome = programs.run(*ON_DAMAGED[program][:2], whole, 300)
            assert outcome.code == 0, outcome.err
            wanted[program] = ON_DAMAGED[program].result(whole)
            shutil.rmtree(whole)
        cwd, place = tmp_path / f"case{case}", Path(place)
        shutil.copytree(made, cwd, symlinks=True)
        harm = (damages.OF_FOLDERS if (cwd / place).is_dir() else damages.OF_FILES)[name]
        harm(cwd / place, random.Random(case))
        before = damages.snapshot(cwd / "outside")
        outcome = programs.run(*ON_DAMAGED[program][:2], cwd, 90)
        fault = outcome.fault or "hangs" * (outcome.code is None)
        if damages.snapshot(cwd / "outside") != before:
            fault = "something outside was changed"
        if not fault and outcome.code == 0 and ON_DAMAGED[program].result(cwd) != wanted[program]:
            fault = "" if is_named(place, outcome.out + outcome.err) else "silent"
            ends["named, and another result"] += not fault
        elif not fault:
            ends["the same result" if outcome.code == 0 else "refused"] += 1
        if fault:
            faults.append(f"{place}: {name}, {program}: {fault}: {outcome.err[-400:]}")
            print(faults[-1], flush=True)
        shutil.rmtree(cwd)
    counts = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    report(f"damages: {len(todo)} ({counts}), {len(faults)} faults")
    assert not faults, "\n".join(faults)


# Values


@pytest.mark.parametrize("number", [10, pytest.param(500, marks=LONG)])
def test_no_value_of_a_flag_or_field_ends_in_a_traceback(tmp_path, programs, made, report, number):
    ends, faults = Counter(), []
    for program, args in option_values.command_lines(0, str(made / "run"))[:number]:
        cwd = tmp_path / "work"
        shutil.copytree(made / "outside", cwd)
        outcome = programs.run(program, args, cwd, 20)
        ends[{None: "began a long work", 2: "refused", 0: "done"}.get(outcome.code, outcome.code)] += 1
        if outcome.fault:
            faults.append(f"{program} {args[-1]!r}: {outcome.fault}: {outcome.err[-300:]}")
            print(faults[-1], flush=True)
        shutil.rmtree(cwd)
    counts = ", ".join(f"{count} {end}" for end, count in ends.items())
    report(f"values of flags and fields: {number} ({counts}), {len(faults)} faults")
    assert not faults, "\n".join(faults)
