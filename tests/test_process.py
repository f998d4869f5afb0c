"""Laws of a program in its surroundings: what cannot be printed is dropped, and every signal ends it in order."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import TINY, command, free_port, metrics, read_until, saved_steps, start_training

from diffusion import devices, process
from diffusion.process import INTERRUPTED, PREEMPTED, STOPPING
from diffusion.training import checkpoints

SIGNALS = {signal.SIGINT: INTERRUPTED, **dict.fromkeys(STOPPING, PREEMPTED)}
ROUTES = {
    "closed": ">&- 2>&- <&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&- 1>/dev/null",
    "stdin closed": "<&- >/dev/null",
    "full": ">/dev/full 2>/dev/full",
    "nobody reads": "2>&1 | true",
    "one line is read": "2>&1 | head -n 1 >/dev/null",
    "tee dies": "2>&1 | (read line; kill -PIPE $BASHPID) || true",
}
RELIABILITY = pytest.mark.reliability


def shell(line, cwd):
    """Runs a shell command; returns (exit code, stderr) of a bash in which each part of a pipe must succeed."""
    result = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=cwd, capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize("route", ["closed", *(pytest.param(r, marks=RELIABILITY) for r in list(ROUTES)[1:])])
def test_a_run_that_can_print_nothing_trains_to_its_end(tmp_path, route):
    line = " ".join(command("train.py", *TINY, "--workdir=run", "--config.train.num_steps=30"))
    assert shell(f"{line} --config.train.log_every=1 {ROUTES[route]}", tmp_path) == (0, "")
    assert saved_steps(tmp_path / "run") == [30]
    assert [int(row["step"]) for row in metrics(tmp_path / "run")] == list(range(1, 31))


@pytest.mark.parametrize("route", [">&- 2>&- <&-", ">/dev/full 2>/dev/full", "| head -n 1 >/dev/null"])
def test_a_list_that_nobody_reads_to_its_end_is_no_error(tmp_path, route):
    assert shell(" ".join([*command("sample.py", "--list"), route]), tmp_path) == (0, "")


def test_a_file_that_is_opened_never_takes_the_place_of_a_closed_stream(tmp_path):
    """What C++ prints to a descriptor that is closed would go into the first file opened."""
    code = (
        f"import runpy; runpy.run_path({process.__file__!r})['ready'](); print(open('a', 'w').fileno() > 2, flush=True)"
    )
    result = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" 3>&1 >&- 2>&- <&-; {sys.executable} -c "{code}" 2>&- <&-'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "True\n"


def test_output_that_can_be_printed_is_printed_whole_whatever_its_letters(tmp_path):
    code = f"import runpy; runpy.run_path({process.__file__!r})['ready'](); print('x' * 10**6, '\\udcff', 'é')"
    for flags in ((), ("-u",)):
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=env)
        assert result.stdout == "x" * 10**6 + " \\udcff \\xe9\n"
        assert result.returncode == 0


@pytest.mark.parametrize(("number", "seconds"), [*((number, 1.0) for number in SIGNALS), (signal.SIGINT, 0.3)])
def test_a_signal_in_the_first_seconds_ends_a_run_quietly_with_its_code(tmp_path, number, seconds):
    process = start_training(tmp_path, "--workdir=run")
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.replace("stopped before the first step; nothing is lost\n", "")) == (
        SIGNALS[number],
        "",
    )


def test_an_error_that_leads_to_itself_is_looked_through_once():
    first, second = ValueError("an image is damaged"), RuntimeError("a worker stopped")
    first.__context__, second.__context__ = second, first
    assert not devices.tells_of_lost(first)
    lost = ValueError("UNAVAILABLE: no answer")
    second.__context__ = lost
    assert devices.tells_of_lost(first)


def test_a_signal_that_a_callback_swallows_is_heard_all_the_same():
    code = """
import gc, os, signal, time
from diffusion.commands import cli
from diffusion.training.stop import Stopped, StopRequest
def main():
    with StopRequest() as stop:
        try:
            gc.callbacks.append(lambda *_: gc.callbacks.clear() or os.kill(os.getpid(), signal.SIGTERM))
            gc.collect()
            for _ in range(200):  # a single sleep may begin just before the signal comes through
                time.sleep(0.1)
        except Stopped:
            return stop.exit_code
cli.start(main, about="")
"""
    before = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (PREEMPTED, "")
    assert time.monotonic() - before < 20


@pytest.mark.usefixtures("compile_once")
def test_a_terminal_that_goes_away_saves_the_run(tmp_path):
    """The kernel sends SIGHUP, and from then on nothing can be printed."""
    ours, theirs = pty.openpty()
    args = ("--workdir=run", "--config.train.num_steps=1000000", "--config.train.log_every=1")
    process = subprocess.Popen(
        command("train.py", *TINY, *args),
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    while b"step 3/" not in seen:
        seen += os.read(ours, 10**5)
    os.close(ours)
    assert process.wait(timeout=60) == PREEMPTED
    (saved,) = saved_steps(tmp_path / "run")
    assert int(metrics(tmp_path / "run")[-1]["step"]) == saved


@RELIABILITY
@pytest.mark.usefixtures("compile_once")
def test_a_run_under_nohup_ignores_the_terminal_and_hears_the_cluster(tmp_path):
    args = ("--workdir=run", "--config.train.num_steps=1000000", "--config.train.log_every=1")
    process = start_training(
        tmp_path, *args, preexec_fn=lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGINT)]
    )
    read_until(process, "step 2/")
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    read_until(process, "step 40/")
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert re.search(r"stopped; saved step", output)


# Several processes


def pair(cwd, *args):
    """Two processes that train one model, once they have made some steps; what they print goes to files."""
    join = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--workdir=run")
    options = ("--config.train.num_steps=1000000", "--config.train.log_every=5", "--config.train.save_every=10")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    processes = []
    for number in range(2):
        with open(cwd / f"{number}.log", "w") as log:
            line = command("train.py", *TINY, *join, *options, *args, f"--process_id={number}")
            processes.append(subprocess.Popen(line, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + 240
    while "step 25/" not in (cwd / "0.log").read_text():
        assert time.monotonic() < end, [(cwd / f"{number}.log").read_text() for number in range(2)]
        time.sleep(0.1)
    return processes


@RELIABILITY
@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_where_a_process_is_lost_the_other_exits_within_a_minute_and_no_checkpoint_is_damaged(tmp_path, lost, how):
    processes = pair(tmp_path)
    saved = saved_steps(tmp_path / "run")
    before = time.monotonic()
    processes[lost].send_signal(how)
    try:
        assert processes[1 - lost].wait(timeout=90) == PREEMPTED
        assert time.monotonic() - before < 60
        assert "another process of the run was lost" in (tmp_path / f"{1 - lost}.log").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert checkpoints.newest_good(tmp_path / "run" / "checkpoints") >= max(saved)
