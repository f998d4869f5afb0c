"""The training loop: steps, log, checkpoints, grids, and an orderly stop."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion import devices
from diffusion.errors import InputError
from diffusion.training.checkpoints import CheckpointWriter
from diffusion.training.recorder import Recorder, Row, Silent
from diffusion.training.step import Metrics, TrainState
from diffusion.training.stop import Stopped, StopRequest

MAX_SKIPPED_IN_ROW = 5
PROFILED = range(10, 15)
"""The steps of --profile, counted from the start of the process."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train and how often to do what, in steps; batch_size is for the rate in images a second."""

    num_steps: int
    batch_size: int
    log_every: int
    save_every: int
    grid_every: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"config.train.{field.name} is {getattr(self, field.name)}; it must be at least 1")


@dataclasses.dataclass
class Run:
    """What the loop works with, apart from the state.

    Attributes:
      train_step: see `make_train_step`.
      batches: (images, cond) of the step after the start, then of the next, and so on; closed at the end.
      learning_rate: number of updates -> rate, for the log.
      recorder, writer: where metrics and checkpoints go; metadata goes into each checkpoint.
      draw_sheet: draws samples of a state and saves them, unless they are there.
      examples: step -> numbers of the examples in its batch, for the report on a step that was skipped.
      stop: the signals heard.
      profile: the folder for a trace of the steps `PROFILED`, or None.
    """

    train_step: Callable[..., tuple[TrainState, Metrics]]
    batches: Iterator[tuple[jax.Array, Any]]
    learning_rate: optax.Schedule
    recorder: Recorder | Silent
    writer: CheckpointWriter
    metadata: dict[str, Any]
    draw_sheet: Callable[[TrainState], None]
    examples: Callable[[int], np.ndarray]
    stop: StopRequest
    profile: Path | None = None


def train(state: TrainState, plan: Plan, run: Run) -> tuple[TrainState, bool]:
    """Trains from state.step to plan.num_steps, or until Ctrl-C or SIGTERM; the last state is always saved.

    A signal in the last grid counts as a stop; the grid is drawn by the next start.

    Args:
      state: where to start; donated.
      plan: lengths and intervals.
      run: what it works with.

    Returns:
      The last state, and whether training came to its end.

    Raises:
      InputError: too many gradients in a row are not finite, or the disk is full; earlier checkpoints are whole.
      Stopped: the signal came before the first step was done, so there was nothing to save.
    """
    start = int(state.step)
    if start and (start % plan.grid_every == 0 or start == plan.num_steps):
        draw = run.stop.call if jax.process_count() == 1 else lambda function, *args: function(*args)
        draw(run.draw_sheet, state)  # the grid that a signal ended; one that is there already is left alone
    progress = tqdm(
        total=plan.num_steps, initial=start, unit="step", dynamic_ncols=True, disable=jax.process_index() > 0 or None
    )
    run.stop.defer()
    with contextlib.closing(run.batches), progress:
        return _Loop(state, plan, run, progress).go()


class _Loop:
    def __init__(self, state, plan, run, progress):
        self.state, self.plan, self.run, self.progress = state, plan, run, progress
        self.start = int(state.step)
        self.in_flight: deque[tuple[int, Metrics]] = deque()
        self.skipped = int(state.skipped)
        self.votes = 0.0
        self.ballots: dict[bool, jax.Array] = {}
        self.clock = _Clock()
        self.tracing = self.traced = False

    def go(self):
        plan, run = self.plan, self.run
        step, finished = self.start, True
        for step in range(self.start + 1, plan.num_steps + 1):
            self._trace(step)
            metrics = self._step(step)
            if step % plan.log_every == 0 or step == plan.num_steps:
                self._settle(0)
                self._log(step, metrics)
            saved = step % plan.save_every == 0 or step == plan.num_steps
            if saved:
                self._save(step)
            if step % plan.grid_every == 0 or step == plan.num_steps:
                with self.clock.paused():
                    finished = self._draws_sheet()
            last = step == plan.num_steps or self._stopping()
            if last and not saved:
                self._save(step)
            if last:  # not self._stopping(), which may have come after the decision to save
                break
        self._end_trace()
        if run.profile is not None and not self.traced:
            self._say(f"no trace: a start of fewer than {PROFILED.start + 1} steps ends before it begins")
        run.writer.wait()
        return self.state, finished and step >= plan.num_steps

    def _draws_sheet(self):
        """False where a signal ended it; what follows then saves and stops."""
        try:
            self._interruptible(self.run.draw_sheet, self.state)
        except Stopped:
            return False
        return True

    def _step(self, step):
        """Starts a step, and waits for the one before last: that keeps the device busy, and the answer to signals
        prompt where a step takes seconds."""
        images, cond = self._next_batch(step)
        first = step == self.start + 1
        call = self._interruptible if first else lambda function, *args: function(*args)
        self.state, metrics = call(self.run.train_step, self.state, images, cond, self._vote(images))
        self.in_flight.append((step, metrics))
        self._settle(0 if first else 2)
        self.clock.steps += 1
        self.progress.update()
        if first:
            self._say(f"first step after {self.clock.elapsed():.1f} s, compilation included")
            self.clock.restart()
        return metrics

    def _next_batch(self, step):
        try:
            return next(self.run.batches)
        except InputError:
            # An image that cannot be read costs no step. Several processes would not all come to this save.
            saved = self.start if (step - 1) % self.plan.save_every else step - 1
            if step - 1 > saved and jax.process_count() == 1:
                self._save(step - 1)
                self.run.writer.wait()
            raise

    def _interruptible(self, function, *args):
        """In one process a signal ends a long call; of several, all must go on to where they agree to stop."""
        return self.run.stop.call(function, *args) if jax.process_count() == 1 else function(*args)

    def _vote(self, images):
        """One entry for each device of the run: whether its process wants to stop."""
        wanted = self.run.stop.received
        if wanted not in self.ballots:
            mesh = images.sharding.mesh
            mine = np.full(len(devices.local_rows(mesh, mesh.size)), wanted, np.float32)
            placed = jax.make_array_from_process_local_data(devices.batch_sharding(mesh), mine, (mesh.size,))
            self.ballots[wanted] = placed
        return self.ballots[wanted]

    def _stopping(self):
        # Several processes go by the votes that travelled with the steps, so that all stop after the same one.
        return self.run.stop.received if jax.process_count() == 1 else self.votes > 0

    def _settle(self, in_flight):
        """Waits until at most in_flight steps are not done, and looks at those that are."""
        while len(self.in_flight) > in_flight:
            step, metrics = self.in_flight.popleft()
            if int(metrics.skipped) > self.skipped:  # waits
                self._report_skipped(step, metrics)
            if jax.process_count() > 1:
                self.votes = max(self.votes, float(metrics.stop))

    def _report_skipped(self, step, metrics):
        self.skipped = int(metrics.skipped)
        in_row = int(metrics.skipped_in_row)
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        facts = {"in_row": in_row, "examples": self.run.examples(step - 1).tolist()}
        self.run.recorder.skipped(step, loss=str(loss), grad_norm=str(grad_norm), **facts)  # JSON knows no NaN
        what = f"the loss is {loss:g}, the norm of the gradient {grad_norm:g}"
        self._say(f"step {step:,}: {what}; skipped ({in_row} in a row), see skipped.jsonl")
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise InputError(
                f"{in_row} steps in a row up to step {step} gave no finite gradient ({what}); earlier checkpoints are "
                "whole. Lower config.optimizer.learning_rate and start in a new --workdir"
            )

    def _log(self, step, metrics):
        """One line on the terminal and one row on disk."""
        plan = self.plan
        seconds, pace = self.clock.take()
        skipped = int(metrics.skipped)
        row = _row(step, metrics, float(self.run.learning_rate(max(0, step - skipped - 1))))
        memory = devices.memory_in_use() / 2**30
        self.run.recorder.scalars(row, pace * plan.batch_size, seconds, memory)
        left = tqdm.format_interval((plan.num_steps - step) / pace) if pace > 0 else "?"
        self._say(
            f"step {step:,}/{plan.num_steps:,}  loss {row.loss:.4f}  gradient {row.grad_norm:.3f}  "
            f"rate {row.learning_rate:.2e}  {pace * plan.batch_size:.1f} images/s  {memory:.2f} GiB  {left} left"
            + (f"  {skipped} skipped" if skipped else "")
        )

    def _save(self, step):
        self._settle(0)
        if not bool(_all_finite(self.state)):
            raise InputError(
                f"the weights are not finite at step {step}; earlier checkpoints are whole. Lower "
                "config.optimizer.learning_rate and start in a new --workdir"
            )
        totals = self.state.totals
        # A stop at any step says nothing for keep_best: its mean may be over a single batch.
        loss = float(totals.loss / totals.steps) if step % self.plan.save_every == 0 else math.nan
        self.run.writer.save(step, self.state, self.run.metadata, loss)

    def _say(self, line):
        if jax.process_index() == 0:
            self.progress.write(line)

    def _trace(self, step):
        done = step - self.start - 1
        if self.run.profile is not None and done == PROFILED.start:
            self._settle(0)
            jax.profiler.start_trace(self.run.profile)
            self.tracing = self.traced = True
        elif done == PROFILED.stop:
            self._end_trace()

    def _end_trace(self):
        if self.tracing:
            self._settle(0)
            jax.profiler.stop_trace()
            self.tracing = False
            self._say(f"wrote a trace to {self.run.profile}")


@jax.jit
def _all_finite(tree):
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _row(step, metrics, learning_rate):
    totals = jax.device_get(metrics.totals)
    with np.errstate(invalid="ignore"):  # 0 / 0 where all steps were skipped, or no sample was in that tenth
        loss, grad_norm = totals.loss / totals.steps, totals.grad_norm / totals.steps
        errors = totals.errors / totals.counts
    return Row(step, float(loss), float(grad_norm), learning_rate, int(metrics.skipped), tuple(map(float, errors)))


class _Clock:
    """The pace since the last row of the log. Compilation and grids do not count as time."""

    def __init__(self):
        self.restart()

    def elapsed(self) -> float:
        return time.monotonic() - self._mark

    def restart(self) -> None:
        self._mark, self.steps = time.monotonic(), 0

    @contextlib.contextmanager
    def paused(self):
        before = time.monotonic()
        yield
        self._mark += time.monotonic() - before

    def take(self) -> tuple[float, float]:
        """(seconds, steps a second) since the last call; the pace is 0 after the first step alone."""
        seconds = self.elapsed()
        pace = self.steps / seconds if self.steps else 0.0
        self.restart()
        return seconds, pace
