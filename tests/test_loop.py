"""Laws of the training loop: what is logged, saved and drawn, how it stops, and what it leaves on disk."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BATCH, IMAGES, assert_same

from diffusion import devices
from diffusion.errors import InputError
from diffusion.training import checkpoints, environment
from diffusion.training.loop import Plan, Run, train
from diffusion.training.recorder import COLUMNS, Recorder, Row
from diffusion.training.saving import CheckpointWriter
from diffusion.training.step import TENTHS, StepOptions, make_train_step
from diffusion.training.stop import INTERRUPTED, PREEMPTED, Stopped, StopRequest

OPTIMIZER = optax.adam(1e-2)
PLAN = Plan(num_steps=12, batch_size=BATCH, log_every=5, save_every=4, grid_every=6)
WHITE = np.full_like(IMAGES, 255)


def fragile(batch):
    """The loss, which is NaN for a white image."""
    loss = tiny.simple(batch)
    return loss._replace(value=loss.value * jnp.where(batch.x_0.min(axis=(1, 2, 3)) > 0.99, jnp.nan, 1))


MESH = tiny.training_mesh(2)


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(tiny.MODEL, fragile, OPTIMIZER, MESH, tiny.KEY, StepOptions([0.9], log_every=PLAN.log_every))


@pytest.fixture
def go(train_step, tmp_path):
    """Trains in tmp_path from the newest checkpoint there; images(step) are those of a step, counted from 0."""

    def go(plan=PLAN, images=lambda step: IMAGES, recorder=Recorder, draw_sheet=lambda state: None, **changes):
        folder = tmp_path / "checkpoints"
        begin = checkpoints.newest_good(folder) or 0
        state = tiny.start(OPTIMIZER, MESH)
        if begin:
            state = checkpoints.load_state(folder, begin, state)
        sharding = devices.batch_sharding(MESH)
        batches = ((jax.device_put(images(step), sharding), None) for step in range(begin, 10**6))
        writer = CheckpointWriter(folder, keep=100, begin=begin)
        with StopRequest() as stop, writer, recorder(tmp_path, begin) as opened:
            examples = lambda step: np.arange(BATCH) + step  # noqa: E731
            run = Run(
                train_step, batches, lambda k: k / 100, opened, writer, {"config": {}}, draw_sheet, examples, stop
            )
            return *train(state, plan, dataclasses.replace(run, **changes)), stop

    return go


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_checkpoints_and_grids_come_at_their_intervals_and_at_the_end(go, tmp_path):
    drawn = []
    state, finished, _ = go(draw_sheet=lambda state: drawn.append(int(state.step)))
    assert finished
    assert int(state.step) == 12
    assert [int(row["step"]) for row in read(tmp_path / "metrics.csv")] == [5, 10, 12]
    assert [int(row["step"]) for row in read(tmp_path / "speed.csv")] == [5, 10, 12]
    assert checkpoints.steps(tmp_path / "checkpoints") == [4, 8, 12]
    assert drawn == [6, 12]
    rates = [float(row["learning_rate"]) for row in read(tmp_path / "metrics.csv")]
    np.testing.assert_allclose(rates, [0.04, 0.09, 0.11])


@pytest.mark.parametrize("stops", [(1,), (4, 5, 11), (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)], ids=str)
def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bits_and_the_same_metrics(
    go, train_step, tmp_path, stops
):
    def interrupting(state, *batch):
        state, metrics = train_step(state, *batch)
        if int(state.step) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return state, metrics

    whole, _, _ = go()
    record = {"metrics.csv": (tmp_path / "metrics.csv").read_bytes()}
    for path in tmp_path.iterdir():
        path.rename(path.with_name(f"whole-{path.name}"))
    for count in range(len(stops) + 1):
        state, finished, stop = go(train_step=interrupting)
        assert finished == (count == len(stops))
        if not finished:
            assert stop.exit_code == PREEMPTED
            assert int(state.step) == stops[count]
    assert_same(state, whole)
    assert {name: (tmp_path / name).read_bytes() for name in record} == record


def test_a_run_that_goes_back_to_an_older_checkpoint_ends_in_the_same_bits_and_metrics(go, tmp_path):
    whole, _, _ = go(images=lambda step: WHITE if step == 9 else IMAGES)
    record = [(tmp_path / name).read_bytes() for name in ("metrics.csv", "skipped.jsonl")]
    for step in (8, 12):
        (tmp_path / "checkpoints" / str(step) / "manifest.json").unlink()
    state, _, _ = go(images=lambda step: WHITE if step == 9 else IMAGES)
    assert_same(state, whole)
    assert [(tmp_path / name).read_bytes() for name in ("metrics.csv", "skipped.jsonl")] == record
    assert checkpoints.newest_good(tmp_path / "checkpoints") == 12


def test_steps_without_a_finite_gradient_are_skipped_counted_and_reported(go, tmp_path, capsys):
    state, finished, _ = go(images=lambda step: WHITE if step in (2, 6, 7) else IMAGES)
    assert finished
    assert int(state.skipped) == 3
    reports = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(r["step"], r["in_row"]) for r in reports] == [(3, 1), (7, 1), (8, 2)]
    assert reports[1]["examples"] == (np.arange(BATCH) + 6).tolist()
    assert [int(row["skipped"]) for row in read(tmp_path / "metrics.csv")] == [1, 3, 3]
    assert all(np.isfinite(float(row["loss"])) for row in read(tmp_path / "metrics.csv"))
    for step in checkpoints.steps(tmp_path / "checkpoints"):
        saved = checkpoints.load_state(tmp_path / "checkpoints", step, tiny.start(OPTIMIZER, MESH))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))
    assert "step 7: the loss is nan, the norm of the gradient nan; skipped (1 in a row)" in capsys.readouterr().out


def test_five_skipped_steps_in_a_row_end_the_run_with_its_last_good_checkpoint_whole(go, tmp_path):
    with pytest.raises(InputError, match="5 steps in a row up to step 9 gave no finite gradient"):
        go(images=lambda step: WHITE if 4 <= step < 9 else IMAGES, plan=dataclasses.replace(PLAN, save_every=3))
    assert checkpoints.newest_good(tmp_path / "checkpoints") in (3, 6)
    state, finished, _ = go(plan=dataclasses.replace(PLAN, save_every=3))
    assert finished
    assert np.isfinite(state.params["gate"]["bias"]).all()


def test_weights_that_are_not_finite_are_never_saved(go, train_step, tmp_path):
    def broken(state, *batch):
        state, metrics = train_step(state, *batch)
        return state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)), metrics

    with pytest.raises(InputError, match="the weights are not finite at step 4"):
        go(train_step=broken)
    assert checkpoints.steps(tmp_path / "checkpoints") == []


def test_a_signal_at_any_moment_of_a_step_loses_no_step(go, tmp_path):
    """The row of step 5 is written before the decision whether step 5 is saved."""

    class Interrupting(Recorder):
        def scalars(self, row, *values):
            super().scalars(row, *values)
            if row.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    state, finished, stop = go(recorder=Interrupting)
    assert not finished
    assert stop.exit_code == INTERRUPTED
    assert int(state.step) == checkpoints.newest_good(tmp_path / "checkpoints") == 5


def test_a_step_is_saved_before_its_grid_is_drawn(go, tmp_path):
    def fails(state):
        raise RuntimeError("no memory for the sampler")

    with pytest.raises(RuntimeError, match="no memory"):
        go(draw_sheet=fails, plan=dataclasses.replace(PLAN, grid_every=PLAN.save_every))
    assert checkpoints.newest_good(tmp_path / "checkpoints") == PLAN.save_every


@pytest.mark.parametrize("when", [6, 12])
def test_a_signal_while_a_grid_is_drawn_is_heard_at_once(go, tmp_path, when):
    """Of the last grid too, which the next start draws."""

    def slow(state):
        if int(state.step) == when:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    before = time.monotonic()
    _, finished, _ = go(draw_sheet=slow)
    assert time.monotonic() - before < 15
    assert not finished
    assert checkpoints.newest_good(tmp_path / "checkpoints") == when
    drawn = []
    _, finished, _ = go(draw_sheet=lambda state: drawn.append(int(state.step)))
    assert finished
    assert drawn == [step for step in (6, 12) if step >= when]


def test_a_signal_while_the_first_step_compiles_ends_the_run_at_once(go, tmp_path):
    def slow(state, *batch):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = time.monotonic()
    with pytest.raises(Stopped):
        go(train_step=slow)
    assert time.monotonic() - before < 15
    assert checkpoints.steps(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("last", [6, PLAN.save_every])
def test_an_image_that_cannot_be_read_costs_no_step(go, tmp_path, last):
    def images(step):
        if step == last:
            raise InputError("image 7 cannot be read")
        return IMAGES

    with pytest.raises(InputError, match="image 7"):
        go(images=images)
    assert checkpoints.newest_good(tmp_path / "checkpoints") == last


def test_a_batch_that_never_comes_after_a_signal_is_a_stop_like_any_other(go, tmp_path):
    """As from a disk that hangs, which the batches give up on; what was trained is saved."""

    def images(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            raise InputError("no images came after the run was asked to stop")
        return IMAGES

    state, finished, stop = go(images=images)
    assert not finished
    assert stop.exit_code == PREEMPTED
    assert int(state.step) == checkpoints.newest_good(tmp_path / "checkpoints") == 6


def test_a_trace_is_written_on_request(go, tmp_path):
    go(plan=dataclasses.replace(PLAN, num_steps=20), profile=tmp_path / "profile")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_is_told_and_leaves_no_part_of_it(go, tmp_path, monkeypatch):
    stop_trace = jax.profiler.stop_trace

    def fails():
        stop_trace()
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    with pytest.warns(match="no trace: .*No space left on device.; look at the disk"):
        _, finished, _ = go(plan=dataclasses.replace(PLAN, num_steps=20), profile=tmp_path / "profile")
    assert finished
    assert not list((tmp_path / "profile").rglob("*.pb"))


def test_signals_stop_at_once_until_there_is_something_to_save():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        assert stop.exit_code == PREEMPTED
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_signal_is_a_request_and_a_second_ctrl_c_interrupts():
    with StopRequest() as stop:
        stop.defer()
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_long_call_returns_its_result_or_its_error():
    with StopRequest() as stop:
        assert stop.call(lambda a, b: a + b, 1, 2) == 3
        assert stop.call(threading.current_thread) is not threading.main_thread()
        with pytest.raises(ValueError, match="no"):
            stop.call(lambda: (_ for _ in ()).throw(ValueError("no")))


def reopened(recorder):
    """Opens a record as a start does, and closes it."""
    with recorder:
        pass


def row(step, loss=1.0):
    return Row(step, loss, 1.0, 1.0, 0, (0.5,) * TENTHS)


def test_metrics_after_the_step_resumed_from_are_written_again(tmp_path):
    with Recorder(tmp_path, 0) as recorder:
        for step in (10, 20, 30):
            recorder.scalars(row(step), 1.0, 2.0, 0.1)
            recorder.skipped(step, loss="nan")
    for name in ("metrics.csv", "speed.csv", "skipped.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write("4")  # cut short by a kill
    with Recorder(tmp_path, 20) as recorder:
        recorder.scalars(row(30), 1.0, 5.0, 0.1)
    speed = [(int(r["step"]), float(r["seconds"])) for r in read(tmp_path / "speed.csv")]
    assert speed == [(10, 2.0), (20, 4.0), (30, 9.0)]
    assert [int(r["step"]) for r in read(tmp_path / "metrics.csv")] == [10, 20, 30]
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [10, 20]


@pytest.mark.parametrize("name", ["metrics.csv", "speed.csv", "skipped.jsonl"])
@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00\n", b"[" * 10**5 + b"\n", b"{}\n"], ids=range(4))
def test_a_record_of_something_else_is_kept_under_another_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{name} holds \d lines .* is kept as {name.replace('.', '-kept-1.')}"):
        reopened(Recorder(tmp_path, 0))
    assert (tmp_path / name.replace(".", "-kept-1.")).read_bytes() == content


ONES = ",1" * (len(COLUMNS) - 1)


@pytest.mark.parametrize("line", [f"x{ONES}", f"5{ONES},1", f"5{ONES[:-1]}much", f"0{ONES}", "\x00,1", "\udcff"])
def test_a_record_with_a_damaged_line_goes_on_with_the_others(tmp_path, line):
    path = tmp_path / "metrics.csv"
    good = f"{','.join(COLUMNS)}\n1{ONES}\n"
    path.write_text(f"{good}{line}\n2{ONES}\n11{ONES}\n", errors="surrogateescape")
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"holds 1 lines .* metrics-kept-1.csv; the record goes on"):
        reopened(Recorder(tmp_path, 10))
    assert path.read_text() == f"{good}2{ONES}\n"
    assert (tmp_path / "metrics-kept-1.csv").read_bytes() == before


def test_what_is_missing_or_changed_in_a_record_is_named_and_never_lost(tmp_path):
    with Recorder(tmp_path, 0) as recorder:
        for step in (10, 20):
            recorder.scalars(row(step), 1.0, 2.0, 0.1)
            recorder.skipped(step, loss="nan")
        sealed = recorder.seal()
        written = {name: (tmp_path / name).read_bytes() for name in sealed}
        assert sealed.keys() == {"metrics.csv", "skipped.jsonl"}
        recorder.scalars(row(30), 1.0, 2.0, 0.1)
    # As it was: nothing is said, and what came later is dropped.
    with warnings.catch_warnings(action="error"):
        reopened(Recorder(tmp_path, 20, sealed))
    assert {name: (tmp_path / name).read_bytes() for name in sealed} == written
    # One digit is another, which is still a row.
    changed = written["metrics.csv"].replace(b"10,1,", b"10,7,")
    (tmp_path / "metrics.csv").write_bytes(changed)
    (tmp_path / "skipped.jsonl").unlink()
    with pytest.warns() as told:
        reopened(Recorder(tmp_path, 20, sealed))
    told = [str(warning.message) for warning in told]
    assert any(
        "metrics.csv is not what was written up to step 20, and is kept as metrics-kept-1.csv" in t for t in told
    )
    assert any("skipped.jsonl is missing, and with it the rows up to step 20" in t for t in told)
    assert (tmp_path / "metrics-kept-1.csv").read_bytes() == changed
    # Notes below the rows are nobody's to delete.
    (tmp_path / "metrics.csv").write_bytes(written["metrics.csv"] + b"my notes\n")
    with pytest.warns(match="holds 1 lines"):
        reopened(Recorder(tmp_path, 20, {"metrics.csv": sealed["metrics.csv"]}))
    assert (tmp_path / "metrics.csv").read_bytes() == written["metrics.csv"]
    assert (tmp_path / "metrics-kept-2.csv").read_bytes().endswith(b"my notes\n")


def test_a_record_without_its_checkpoint_is_kept(tmp_path):
    with Recorder(tmp_path, 0) as recorder:
        recorder.scalars(row(10), 1.0, 2.0, 0.1)
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.warns(match=r"is of a run that has no checkpoint any more, and is kept as metrics-kept-1.csv"):
        reopened(Recorder(tmp_path, 0))
    assert (tmp_path / "metrics-kept-1.csv").read_bytes() == before
    with warnings.catch_warnings(action="error"):
        reopened(Recorder(tmp_path, 0))


def test_a_checkpoint_vouches_for_the_record(go, tmp_path):
    go()
    for step, row_of_step in ((4, 0), (8, 1), (12, 3)):
        sealed = checkpoints.sealed_record(tmp_path / "checkpoints", step)["metrics.csv"]
        found = (tmp_path / "metrics.csv").read_bytes()[: sealed["bytes"]]
        assert hashlib.sha256(found).hexdigest() == sealed["sha256"]
        assert len(found.splitlines()) == 1 + row_of_step


@pytest.mark.parametrize("name", ["metrics.csv", "speed.csv", "skipped.jsonl"])
def test_a_record_is_not_written_through_a_link(tmp_path, name):
    run, thesis = tmp_path / "run", tmp_path / "thesis.tex"
    run.mkdir()
    thesis.write_text("years of work")
    (run / name).symlink_to(thesis)
    with pytest.raises(InputError, match=f"{name} is a link"):
        Recorder(run, 0)
    assert thesis.read_text() == "years of work"


def test_an_error_of_the_disk_ends_the_record_and_not_what_lies_beside_it(tmp_path):
    """Events and speed.csv are told once and left out."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from pathlib import Path
from diffusion.training.recorder import Recorder, Row
recorder = Recorder(Path({str(tmp_path)!r}), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in range(100):
    recorder.image("samples", np.random.default_rng(0).integers(0, 256, (64, 64, 1)).astype(np.uint8), step)
print("the run goes on")
for step in range(1000):
    recorder.scalars(Row(step, 1.0, 1.0, 1.0, 0, (0.5,) * 10), 1.0, 1.0, 1.0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.count("TensorBoard's events cannot be written (File too large); the run goes on without") == 1
    assert "the run goes on" in result.stdout
    assert "OSError: [Errno 27] File too large" in result.stderr


def test_every_start_of_a_run_is_described(tmp_path):
    path = tmp_path / "environment.json"
    for step in (0, 7):
        environment.append(path, environment.describe(MESH, step), within=tmp_path)
    starts = json.loads(path.read_text())
    assert [start["step"] for start in starts] == [0, 7]
    assert starts[0]["packages"]["jax"] == jax.__version__
    assert starts[0]["devices"] == "2 x cpu"
    path.write_text("{")
    with pytest.warns(match="environment.json holds no list of starts, and is kept as environment-kept-1.json"):
        environment.append(path, starts[0], within=tmp_path)
    assert json.loads(path.read_text()) == starts[:1]
    assert (tmp_path / "environment-kept-1.json").read_text() == "{"
