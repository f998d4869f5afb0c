"""The training loop: steps, log, checkpoints, grids, and an orderly stop."""

import contextlib
import dataclasses
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import optax
from tqdm import tqdm

from diffusion.errors import InputError
from diffusion.training.checkpoints import CheckpointWriter
from diffusion.training.recorder import Recorder
from diffusion.training.step import Metrics, TrainState


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


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into `received`, so that the step in progress ends and is saved.

    A second Ctrl-C interrupts at once. A context manager, for the main thread.
    """

    def __init__(self):
        self.received = False

    def __enter__(self):
        # What a shell starts in the background ignores Ctrl-C; leave that as it is.
        heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._receive) for s in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def train(
    state: TrainState,
    train_step: Callable[[TrainState, jax.Array, Any], tuple[TrainState, Metrics]],
    next_batch: Callable[[int], tuple[jax.Array, Any]],
    plan: Plan,
    learning_rate: optax.Schedule,
    recorder: Recorder,
    writer: CheckpointWriter,
    metadata: dict[str, Any],
    draw_grid: Callable[[TrainState], None],
) -> tuple[TrainState, bool]:
    """Trains from state.step to plan.num_steps, or until Ctrl-C or SIGTERM; the last state is always saved.

    Args:
      state: where to start; donated.
      train_step: see `make_train_step`.
      next_batch: step -> (images, cond), a pure function, so that a resumed run sees the same batches.
      plan: lengths and intervals.
      learning_rate: step -> rate, for the log.
      recorder, writer: where metrics and checkpoints go; metadata goes into each checkpoint.
      draw_grid: draws and saves samples of a state.

    Returns:
      The last state, and whether training came to its end.

    Raises:
      InputError: the loss is not finite (nothing is saved then), or the disk is full.
    """
    start = int(state.step)
    meter = _Meter()
    in_flight: deque[Metrics] = deque()
    progress = tqdm(total=plan.num_steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
    with StopRequest() as stop, progress:
        for step in range(start + 1, plan.num_steps + 1):
            state, metrics = train_step(state, *next_batch(step - 1))
            meter.add(metrics)
            in_flight.append(metrics)
            # Waiting for the step before last keeps the device busy, and Ctrl-C prompt where a step takes seconds.
            if len(in_flight) > 2:
                jax.block_until_ready(in_flight.popleft())
            progress.update()
            if step == start + 1:
                jax.block_until_ready(metrics)
                progress.write(f"first step after {meter.elapsed():.1f} s, compilation included")
                meter.restart_clock()
            last = step == plan.num_steps or stop.received
            if step % plan.log_every == 0 or last:
                _log(meter, step, plan, float(learning_rate(step - 1)), recorder, progress)
            if step % plan.save_every == 0 or last:
                _require_finite(metrics, step)
                writer.save(step, state, metadata)
            if step % plan.grid_every == 0 or step == plan.num_steps:
                with meter.paused():
                    draw_grid(state)
            if last:  # not stop.received, which may have come after the decision to save
                break
    writer.wait()
    return state, int(state.step) >= plan.num_steps


class _Meter:
    """Mean metrics and pace since the last row of the log. Compilation and grids do not count as time."""

    def __init__(self):
        self._metrics: list[Metrics] = []
        self._timed = 0
        self.restart_clock()

    def add(self, metrics: Metrics) -> None:
        self._metrics.append(metrics)
        self._timed += 1

    def elapsed(self) -> float:
        return time.monotonic() - self._mark

    def restart_clock(self) -> None:
        self._mark, self._timed = time.monotonic(), 0

    @contextlib.contextmanager
    def paused(self):
        before = time.monotonic()
        yield
        self._mark += time.monotonic() - before

    def take(self) -> tuple[Metrics, float, float]:
        """(mean metrics, steps a second, seconds) since the last call; the rate is 0 after the first step alone."""
        mean = Metrics(*(sum(map(float, values)) / len(values) for values in zip(*self._metrics, strict=True)))
        seconds = self.elapsed()
        rate = self._timed / seconds if self._timed else 0.0
        self._metrics.clear()
        self.restart_clock()
        return mean, rate, seconds


def _log(meter, step, plan, learning_rate, recorder, progress):
    """One line on the terminal and one row on disk."""
    mean, rate, seconds = meter.take()
    _require_finite(mean, step)
    recorder.scalars(step, mean.loss, mean.grad_norm, learning_rate, rate * plan.batch_size, seconds)
    left = tqdm.format_interval((plan.num_steps - step) / rate) if rate > 0 else "?"
    progress.write(
        f"step {step:,}/{plan.num_steps:,}  loss {mean.loss:.4f}  gradient {mean.grad_norm:.3f}  "
        f"rate {learning_rate:.2e}  {rate * plan.batch_size:.1f} images/s  {left} left"
    )


def _require_finite(metrics, step):
    """A finite loss belongs to the weights before the step, a finite gradient to those after it."""
    loss, grad_norm = map(float, metrics)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(
            f"the loss is {loss}, the gradient {grad_norm} at step {step}; earlier checkpoints are whole. Lower "
            "config.optimizer.learning_rate and start in a new --workdir, or resume to try again from the last one"
        )
