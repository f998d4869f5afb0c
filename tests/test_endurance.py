"""What programs survive: kills at chosen operations, damaged and hostile files, any value, and streams that go away.

`make reliability` runs the long versions and prints their counts; `make test` runs a short one of each.
"""

import json
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import damages
import hostile
import numpy as np
import option_values
import pytest
import strangers
from commands import ROOT, TINY, command, digest, saved_steps, shared_cache
from forked import Programs

LONG = pytest.mark.reliability


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
TRAIN = training("run", *SAVES, "--config.train.keep=2", last=4)
ONE = drawing("run/samples/one", "--workdir=run", "--num=4", "--steps=2", "--png")
MANY = drawing("run/samples/many", "--workdir=run", "--num=1001", "--steps=1")
ESTIMATED = drawing("run/samples/estimated", "--workdir=run", "--num=4", "--steps=1", "--sampler=analytic_dpm")
MEASURE = measuring("run", "--workdir=run", "--steps=1")
CONVERT = converting("run/model.safetensors", "--workdir=run")
MADE = (TRAIN, ONE, MANY, ESTIMATED, MEASURE, CONVERT)
"""What makes the folder that is killed in and damaged: a run with samples, figures, estimates and a weights file."""


@pytest.fixture(scope="module")
def made(programs, tmp_path_factory):
    """A folder in which the commands of `MADE` have run, with the folder `outside` beside the run."""
    cwd = tmp_path_factory.mktemp("made")
    for program, args, _ in MADE:
        outcome = programs.run(program, args, cwd, 300)
        assert outcome.code == 0, outcome.err
    damages.make_outside(cwd)
    return cwd


def undisturbed(job, made, programs, tmp_path):
    """Returns the result of a command in a copy of the folder, or of its one run there."""
    if job in MADE:
        return job.result(made)
    whole = tmp_path / "whole"
    shutil.copytree(made, whole)
    outcome = programs.run(*job[:2], whole, 300)
    assert outcome.code == 0, outcome.err
    result = job.result(whole)
    shutil.rmtree(whole)
    return result


def without_fields(job):
    return f"{job.program} {' '.join(arg for arg in job.args if not arg.startswith('--config.'))}"


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
    for number, (job, times) in enumerate(todo.items()):
        whole = tmp_path / f"whole{number}"
        shutil.copytree(made, whole)
        seen = programs.run(*job[:2], whole, 300, watch=str(whole))
        assert seen.code == 0, seen.err
        wanted = job.result(whole)
        for turn in range(times):
            cwd = tmp_path / f"{number}-{turn}"
            shutil.copytree(made, cwd)
            at = max(1, round(seen.operations * (turn + 1 + (times == 1)) / (times + 1 + (times == 1))))
            killed = programs.run(*job[:2], cwd, 300, watch=str(cwd), kill_at=at)
            again = programs.run(*job[:2], cwd, 300)
            what = f"{without_fields(job)}, killed at operation {at} of {seen.operations}"
            count += killed.code == -9
            left = [str(path.relative_to(cwd)) for path in cwd.rglob("*") if is_temporary(path)]
            if killed.code not in (-9, 0) or again.code != 0:
                faults.append(f"{what}: {killed.code}, then {again.code}: {again.err[-300:]}")
            elif job.result(cwd) != wanted:
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
    "sample": ONE,
    "sample in shards": MANY,
    "sample with estimates": ESTIMATED,
    "sample from the weights file": drawing(
        "run/samples/file", "--workdir=run/model.safetensors", "--num=4", "--steps=2"
    ),
    "evaluate": measuring("run", "--workdir=run", "--steps=1,2"),
    "convert": CONVERT,
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


READ = {
    "train": ("checkpoints/4", "metrics.csv", "speed.csv", "environment.json", ".lock"),
    "sample": ("checkpoints/4", "samples/one"),
    "sample in shards": ("checkpoints/4", "samples/many"),
    "sample with estimates": ("analytic_gamma.json", ".analytic_gamma.lock", "samples/estimated"),
    "sample from the weights file": ("model.safetensors", "samples/file"),
    "evaluate": ("checkpoints/4/ema", "evaluation.", ".evaluation.lock"),
    "convert": ("checkpoints/4", "model.safetensors"),
}
"""What each program reads or replaces in the run folder, by the beginnings of paths."""


def cases(folder, count):
    """Returns `count` cases: half of them any damage, place and program, half where the program reads what is damaged.

    Of what it reads a small file comes as often as the many files of a checkpoint.
    """
    places = [path for path in damages.entries(folder) if path.parts[0] == "run"]
    kinds = [(path, damages.OF_FOLDERS if (folder / path).is_dir() else damages.OF_FILES) for path in places]
    every = [(path, name, program) for (path, names) in kinds for name, program in product(names, ON_DAMAGED)]
    rng, read = random.Random(1), []
    for program, begin in ((program, begin) for program, begins in READ.items() for begin in begins):
        here = [case for case in every if case[2] == program and str(case[0]).startswith(f"run/{begin}")]
        read += rng.sample(here, min(len(here), 12))
    return random.Random(0).sample(every, count)[: count // 2] + rng.sample(read, count - count // 2)


def is_named(path, text):
    """Whether a program has told of a file in a note or warning, by its name or the step whose checkpoint it is of."""
    told = "\n".join(line for line in text.splitlines() if line.startswith(("note: ", "warning: ")))
    of_step = path.parts[1:3] if path.parts[1:2] == ("checkpoints",) and len(path.parts) > 2 else path.parts
    return path.name in told or "/".join(of_step) in told


@pytest.mark.parametrize("number", [6, pytest.param(300, marks=LONG)])
def test_what_is_damaged_in_a_run_folder_is_named_or_makes_no_difference(tmp_path, programs, made, report, number):
    todo = SOME if number == len(SOME) else cases(made, number)
    wanted, ends, faults = {}, Counter(), []
    for case, (place, name, program) in enumerate(todo):
        if program not in wanted:
            wanted[program] = undisturbed(ON_DAMAGED[program], made, programs, tmp_path)
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
        outcome = programs.run(program, args, cwd, 20 if number > 10 else 8)
        ends[{None: "began a long work", 2: "refused", 0: "done"}.get(outcome.code, outcome.code)] += 1
        if outcome.fault:
            faults.append(f"{program} {args[-1]!r}: {outcome.fault}: {outcome.err[-300:]}")
            print(faults[-1], flush=True)
        shutil.rmtree(cwd)
    counts = ", ".join(f"{count} {end}" for end, count in ends.items())
    report(f"values of flags and fields: {number} ({counts}), {len(faults)} faults")
    assert not faults, "\n".join(faults)


# Hostile files

AT_MOST = 1.0
"""The GiB that a program may take for a hostile file, beyond what it has imported."""

IMAGES = (*TINY, f"--config={ROOT}/configs/images.py", "--config.data.size=8", "--config.train.num_steps=1")
DRAW = ("--num=2", "--steps=2", "--out=drawn")
READERS = {
    "archive": lambda path: ("train", (*IMAGES, f"--config.data.path={path}", "--workdir=new")),
    "image": lambda path: ("train", (*IMAGES, f"--config.data.path={path.parent}", "--workdir=new")),
    "folder": lambda path: ("train", (*IMAGES, f"--config.data.path={path}", "--workdir=new")),
    "weights.safetensors": lambda path: ("sample", (f"--workdir={path}", *DRAW)),
    "inception.safetensors": lambda path: ("evaluate", (*INCEPTION, f"--inception={path}")),
    "inception.pth": lambda path: ("evaluate", (*INCEPTION, f"--inception={path}")),
    "table.json": lambda path: ("sample", ("--workdir=run", f"--sampler={path}", "--num=2", "--out=drawn")),
    "results": lambda path: ("evaluate", ("--workdir=run", "--steps=1", "--num=65", f"--out={path}")),
    "samples": lambda path: ("sample", ("--workdir=run", "--num=2500", "--steps=1", f"--out={path}")),
    "run": lambda path: ("convert", (f"--workdir={path}", "--out=drawn.safetensors")),
}
"""For each kind of file, path -> the program that reads it, and its arguments."""

INCEPTION = ("--workdir=run", "--steps=1", "--num=65", "--features=inception")
MAY_BE_MADE = ("new", "drawn", "drawn.safetensors", "runs")


def hostile_files(count):
    """Returns (kind, name, builder) of so many files, as many as there are of each kind, in random order."""
    kinds = {"archive": hostile.ARCHIVES, "image": hostile.IMAGES, "folder": hostile.FOLDERS}
    kinds |= {kind: builders for kind, (_, builders) in strangers.KINDS.items() if kind in READERS}
    rng = random.Random(0)
    queues = [[(kind, *item) for item in rng.sample([*kinds[kind].items()], len(kinds[kind]))] for kind in READERS]
    # Twice as many archives and images as of another kind: the whole internet has them.
    rounds = (queue.pop() for _ in range(count) for queue in (*queues, *queues[:2]) if queue)
    return list(islice(rounds, count))


@pytest.mark.parametrize("number", [4, pytest.param(60, marks=LONG)])
def test_a_hostile_file_ends_in_one_line_or_is_read_and_does_no_harm(tmp_path, programs, made, report, number):
    ends, faults, most = Counter(), [], {}
    limit = programs.run("sample", ["--list"], tmp_path).gib + AT_MOST
    for case, (kind, name, build) in enumerate(hostile_files(number)):
        cwd = tmp_path / f"case{case}"
        shutil.copytree(made, cwd)
        place = cwd / "in" / "here" / (name if kind == "image" else kind)
        place.parent.mkdir(parents=True)
        build(place)
        before, beside = damages.snapshot(cwd / "outside"), {*place.parent.iterdir(), *cwd.iterdir()}
        outcome = programs.run(*READERS[kind](place), cwd, 120)
        fault = outcome.fault or "hangs" * (outcome.code is None)
        written = {*place.parent.iterdir(), *cwd.iterdir()} - beside - {cwd / made for made in MAY_BE_MADE}
        if written or (cwd / "in" / "a.png").exists() or damages.snapshot(cwd / "outside") != before:
            fault = f"writes outside: {written}"
        if outcome.gib > limit:
            fault = f"{outcome.gib:.2f} GiB"
        most[f"{kind}, {name}"] = outcome.gib - limit + AT_MOST
        ends["refused" if outcome.code == 2 else "read"] += 1
        if fault:
            faults.append(f"{kind}, {name}: {fault}: {outcome.err[-400:]}")
            print(faults[-1], flush=True)
        shutil.rmtree(cwd)
    counts = ", ".join(f"{count} {end}" for end, count in ends.items())
    worst = max(most, key=most.get)
    memory = f"at most {most[worst]:.2f} GiB ({worst})"
    report(f"hostile files: {number} ({counts}), {memory}, {len(faults)} faults")
    assert not faults, "\n".join(faults)


# Streams

ENDLESS = ("--config.train.log_every=1", "--config.train.save_every=100", "--config.train.grid_every=100000")
TRAINED = training("streamed", *ENDLESS, last=400)


@pytest.fixture
def heard():
    """Lets this process hear SIGHUP, and so its children, if a shell's & or nohup has told it not to."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def in_shell(route):
    """Returns (words, cwd) -> exit code of a command in a shell, with this behind it, where each part must succeed."""

    def run(words, cwd):
        line = f"{shlex.join(words)} {route}"
        shell = ["bash", "-o", "pipefail", "-c", line]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(shell, cwd=cwd, timeout=300, **nowhere).returncode

    return run


def wait_for(text, read):
    """Reads until the text has come."""
    seen, end = b"", time.monotonic() + 200
    while text not in seen and time.monotonic() < end:
        seen += read()


def in_a_terminal_that_goes_away(words, cwd):
    """The kernel sends SIGHUP, and from then on nothing can be printed."""

    ours, theirs = pty.openpty()
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen(["setsid", "--ctty", *words], cwd=cwd, **ends)
    os.close(theirs)
    wait_for(b"step 3/", lambda: os.read(ours, 10**5))
    os.close(ours)
    return process.wait(200)


def under_nohup(words, cwd):
    with (cwd / "log").open("wb") as log:
        process = subprocess.Popen(["nohup", *words], cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with (cwd / "log").open("rb") as log:
        wait_for(b"step 3/", lambda: log.read() or time.sleep(0.05) or b"")
    process.send_signal(signal.SIGHUP)
    return process.wait(200)


UNTIL_STEP_3 = "while ! grep -q 'step 3/' log; do sleep 0.05; done"
STREAMS = {
    "head, sampling": (ONE, in_shell("2>&1 | head -n 1")),
    "stdout closed, converting": (CONVERT, in_shell(">&-")),
    "a full disk behind both, measuring": (ON_DAMAGED["evaluate"], in_shell(">/dev/full 2>/dev/full")),
    "a tee that is killed": (TRAINED, in_shell(f"2>&1 | {{ tee log <&0 >&2 & {UNTIL_STEP_3}; kill -9 $!; }}")),
    "stdout closed": (TRAINED, in_shell(">&-")),
    "stderr closed": (TRAINED, in_shell("2>&-")),
    "all closed": (TRAINED, in_shell(">&- 2>&- <&-")),
    "a full disk behind both": (TRAINED, in_shell(">/dev/full 2>/dev/full")),
    "a reader that goes at once": (TRAINED, in_shell("2>&1 | true")),
    "a reader that goes after a line": (TRAINED, in_shell("2>&1 | head -n 1")),
    "a terminal that goes away": (TRAINED, in_a_terminal_that_goes_away),
    "nohup": (TRAINED, under_nohup),
}
"""What a program prints into, the command that does it, and how it is run."""


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [3, pytest.param(12, marks=LONG)])
def test_streams_and_terminals_that_go_away_cost_nothing(tmp_path, programs, made, report, monkeypatch, number):
    for name, value in programs.env.items():
        monkeypatch.setenv(name, value)
    wanted, ends, faults = {}, Counter(), []
    for case, (name, (job, run)) in enumerate([*STREAMS.items()][:number]):
        if job not in wanted:
            wanted[job] = undisturbed(job, made, programs, tmp_path)
        cwd = tmp_path / str(case)
        shutil.copytree(made, cwd)
        code = run(command(f"{job.program}.py", *job.args), cwd)
        if code == 75:  # stopped, and the same command must go on
            saved = saved_steps(cwd / "streamed")[-1]
            assert (cwd / "streamed" / "metrics.csv").read_text().splitlines()[-1].startswith(f"{saved},")
            assert programs.run(*job[:2], cwd, 300).code == 0
        ends[f"exit code {code}"] += 1
        if code not in (0, 75):
            faults.append(f"{name}: exit code {code}")
        elif job.result(cwd) != wanted[job]:
            faults.append(f"{name}: another result")
    counts = ", ".join(f"{count} with {end}" for end, count in ends.items())
    report(f"terminals, pipes and closed streams: {number} ({counts}), {len(faults)} losses")
    assert not faults, "\n".join(faults)
