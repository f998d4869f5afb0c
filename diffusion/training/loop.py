"""Runs the training loop: steps, log, checkpoints, sheets of samples, and an orderly stop."""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import devices
from diffusion.errors import InputError
from diffusion.training.progress import Progress
from diffusion.training.recorder import Recorder, Row, Silent
from diffusion.training.saving import CheckpointWriter
from diffusion.training.state import Metrics, TrainState
from diffusion.training.stop import Stopped, StopRequest
from diffusion.training.trace import Trace

MAX_SKIPPED_IN_ROW = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says how long to train and how often to do what, in steps; batch_size gives the rate in images a second."""

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
    """Holds what the loop works with, apart from the state.

    Attributes:
      train_step: see `make_train_step`.
      batches: (images, cond) of the step after the start, then of the next, and so on; closed at the end.
      learning_rate: number of updates made -> rate, for the log.
      recorder, writer: where metrics and checkpoints go; metadata goes into each checkpoint.
      draw_sheet: draws samples from a state and saves them as one picture, unless it is there already.
      examples: number of steps made -> numbers of the examples in the next batch, for the report on a skipped step.
      stop: hears the signals that ask to stop.
      profile: the folder for a trace of the steps `trace.PROFILED`, or None.
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
    """Trains from state.step to plan.num_steps, or until a signal asks to stop; the last state is always saved.

    The signals are Ctrl-C and `process.STOPPING`.
    A signal while the last sheet is drawn counts as a stop; the next start draws that sheet.

    Args:
      state: where to start; donated.
      plan: how long, and how often to do what.
      run: what the loop works with.

    Returns:
      The last state, and whether training came to its end.

    Raises:
      InputError: too many gradients in a row are not finite, or the disk is full; earlier checkpoints are whole.
      Stopped: the signal came before the first step was done, so there was nothing to save.
    """
    start = int(state.step)
    # A signal may have cut off the sheet of this step; draw_sheet leaves one alone that is complete.
    if start and (start % plan.grid_every == 0 or start == plan.num_steps):
        draw = run.stop.call if jax.process_count() == 1 else lambda function, *args: function(*args)
        draw(run.draw_sheet, state)
    progress = Progress(start, plan.num_steps, shown=jax.process_index() == 0)
    run.stop.defer()
    with contextlib.closing(run.batches), progress:
        return _Loop(state, plan, run, progress).go()


class _Loop:
    """Makes the steps of one start of the program, and keeps what passes from one to the next."""

    def __init__(self, state, plan, run, progress):
        self.state, self.plan, self.run, self.progress = state, plan, run, progress
        self.start = int(state.step)
        self.in_flight: deque[tuple[int, Metrics]] = deque()  # steps that were started and not yet looked at
        self.skipped = int(state.skipped)  # as far as they have been reported
        self.votes = 0.0  # above 0 once a process wants to stop
        self.ballots: dict[bool, jax.Array] = {}  # either vote of this process, once it is on the devices
        self.trace = Trace(run.profile, lambda: self._settle(0), progress.say)

    def go(self):
        """Makes the steps; returns the last state, and whether training came to its end."""
        plan, run = self.plan, self.run
        step, finished = self.start, True
        for step in range(self.start + 1, plan.num_steps + 1):
            self.trace.before(step - self.start - 1)
            try:
                metrics = self._step(step)
            except Stopped:
                if step - 1 == self.start:
                    raise
                finished = False  # the next batch did not come, and the steps before it are saved
                break
            if step % plan.log_every == 0 or step == plan.num_steps:
                self._settle(0)
                self._log(step, metrics)
            saved = step % plan.save_every == 0 or step == plan.num_steps
            if saved:
                self._save(step)
            if step % plan.grid_every == 0 or step == plan.num_steps:
                with self.progress.paused("drawing samples"):
                    finished = self._draws_sheet()
            last = step == plan.num_steps or self._stopping()
            if last and not saved:
                self._save(step)
            if last:  # not self._stopping() again: after a signal since then nothing would be saved
                break
        self.trace.end()
        run.writer.wait()
        return self.state, finished and step >= plan.num_steps

    def _draws_sheet(self):
        """Draws the sheet; returns False if a signal cut it off. The loop then saves and stops as after any signal."""
        self.run.writer.require_ours()
        try:
            self._interruptible(self.run.draw_sheet, self.state)
        except Stopped:
            return False
        return True

    def _step(self, step):
        """Starts a step and waits for the one before last.

        That keeps the device busy, and still answers a signal soon where a step takes seconds.
        """
        images, cond = self._next_batch(step)
        first = step == self.start + 1
        call = self._interruptible if first else lambda function, *args: function(*args)
        with self.progress.compiling() if first else contextlib.nullcontext():
            self.state, metrics = call(self.run.train_step, self.state, images, cond, self._vote(images))
            self.in_flight.append((step, metrics))
            self._settle(0 if first else 2)
        if not first:
            self.progress.step(step)
        return metrics

    def _next_batch(self, step):
        """Returns the next batch; saves what has been trained if it cannot be read, or does not come after a signal."""
        try:
            return next(self.run.batches)
        except InputError:
            # So a damaged image costs no steps. A save needs all processes, and the others may not have failed.
            saved = self.start if (step - 1) % self.plan.save_every else step - 1
            if step - 1 > saved and jax.process_count() == 1:
                self._save(step - 1)
                self.run.writer.wait()
            if self.run.stop.received and jax.process_count() == 1:
                raise Stopped from None
            raise

    def _interruptible(self, function, *args):
        """Makes a long call that a signal can end, unless several processes have to stop after the same step."""
        return self.run.stop.call(function, *args) if jax.process_count() == 1 else function(*args)

    def _vote(self, images):
        """Returns an entry for each device of the run: 1 if its process wants to stop, else 0."""
        wanted = self.run.stop.received
        if wanted not in self.ballots:
            mesh = images.sharding.mesh
            mine = np.full(len(devices.local_rows(mesh, mesh.size)), wanted, np.float32)
            placed = jax.make_array_from_process_local_data(devices.batch_sharding(mesh), mine, (mesh.size,))
            self.ballots[wanted] = placed
        return self.ballots[wanted]

    def _stopping(self):
        """Tells whether to stop now."""
        # Several processes count the votes that went through the steps, so that all of them stop after the same step.
        return self.run.stop.received if jax.process_count() == 1 else self.votes > 0

    def _settle(self, in_flight):
        """Waits until at most in_flight steps are unfinished, and looks at the metrics of the others."""
        while len(self.in_flight) > in_flight:
            step, metrics = self.in_flight.popleft()
            if int(metrics.skipped) > self.skipped:  # reading the number waits for the step
                self._report_skipped(step, metrics)
            if jax.process_count() > 1:
                self.votes = max(self.votes, float(metrics.stop))

    def _report_skipped(self, step, metrics):
        """Reports a step that was skipped; gives up after `MAX_SKIPPED_IN_ROW` in a row."""
        self.skipped = int(metrics.skipped)
        in_row = int(metrics.skipped_in_row)
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        facts = {"in_row": in_row, "examples": self.run.examples(step - 1).tolist()}
        self.run.recorder.skipped(step, loss=str(loss), grad_norm=str(grad_norm), **facts)  # JSON has no NaN
        what = f"the loss is {loss:g}, the norm of the gradient {grad_norm:g}"
        self.progress.say(f"step {step:,}: {what}; skipped ({in_row} in a row), see skipped.jsonl")
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise InputError(
                f"{in_row} steps in a row up to step {step} gave no finite gradient ({what}); earlier checkpoints are "
                "whole. Lower config.optimizer.learning_rate and start in a new --workdir"
            )

    def _log(self, step, metrics):
        """Writes one line on the terminal and one row on disk."""
        plan = self.plan
        seconds, pace = self.progress.take()
        skipped = int(metrics.skipped)
        # The rate goes by updates, and a skipped step made none.
        row = _row(step, metrics, float(self.run.learning_rate(max(0, step - skipped - 1))))
        memory = devices.memory_in_use() / 2**30
        self.run.recorder.scalars(row, pace * plan.batch_size, seconds, memory)
        measured = f"{pace * plan.batch_size:.1f} images/s" if pace else "measuring the pace"
        left = f"  {self.progress.left(step, pace)} left" if pace and step < plan.num_steps else ""
        self.progress.say(
            f"step {step:,}/{plan.num_steps:,}  loss {row.loss:.4f}  gradient {row.grad_norm:.3f}  "
            f"rate {row.learning_rate:.2e}  {measured}  {memory:.2f} GiB{left}"
            + (f"  {skipped} skipped" if skipped else "")
        )

    def _save(self, step):
        """Saves a checkpoint, unless the state is not finite."""
        self._settle(0)
        if not bool(_all_finite(self.state)):
            raise InputError(
                f"the weights are not finite at step {step}; earlier checkpoints are whole. Lower "
                "config.optimizer.learning_rate and start in a new --workdir"
            )
        totals = self.state.totals
        # keep_best compares mean losses, and after a stop in between the mean may be over a single batch.
        loss = float(totals.loss / totals.steps) if step % self.plan.save_every == 0 else math.nan
        # The record is on disk before the checkpoint that vouches for it.
        self.run.writer.save(step, self.state, self.run.metadata, loss, self.run.recorder.seal())


@jax.jit
def _all_finite(tree):
    """Tells whether every number in a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _row(step, metrics, learning_rate):
    """Returns the row of the log: means over the steps since the last row."""
    totals = jax.device_get(metrics.totals)
    with np.errstate(invalid="ignore"):  # 0 / 0 if all steps were skipped, or no t fell into a tenth
        loss, grad_norm = totals.loss / totals.steps, totals.grad_norm / totals.steps
        errors = totals.errors / totals.counts
    return Row(step, float(loss), float(grad_norm), learning_rate, int(metrics.skipped), tuple(map(float, errors)))
