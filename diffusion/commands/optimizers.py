"""From the section config.optimizer to the optimizer and its learning rate."""

from collections.abc import Sequence
from itertools import pairwise

import optax
from ml_collections import ConfigDict

from diffusion.errors import InputError, nearest, require_range

DECAYS = ("constant", "linear", "cosine")


def learning_rate(config: ConfigDict, num_steps: int, restarts: Sequence[int] = ()) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up, then constant, or linear or a cosine to 0 at num_steps.

    Args:
      config: the section config.optimizer.
      num_steps: of the whole training.
      restarts: steps at which all this begins anew, to end at the next of them.
    """
    if config.decay not in DECAYS:
        raise InputError(f"config.optimizer.decay is {config.decay!r}; {nearest(config.decay, DECAYS)}")
    require_range("config.optimizer.learning_rate", config.learning_rate, 0, open_ends="low, high")
    require_range("config.optimizer.warmup_steps", config.warmup_steps, 0)
    if restarts:
        begins = [0, *restarts]
        parts = [learning_rate(config, end - begin) for begin, end in pairwise([*begins, num_steps])]
        return optax.join_schedules(parts, list(restarts))
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    left = max(1, num_steps - config.warmup_steps)
    if config.decay == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.decay == "linear":
        after = optax.linear_schedule(config.learning_rate, 0.0, left)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, left)
    # Step 0 already moves: a warm-up of n steps ends at update n, not n + 1.
    return optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])


def make_optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns Adam with clipping of the whole gradient; config is the section config.optimizer."""
    require_range("config.optimizer.clip_norm", config.clip_norm, 0, open_ends="low")
    require_range("config.optimizer.b1", config.b1, 0, 1, open_ends="high")
    require_range("config.optimizer.b2", config.b2, 0, 1, open_ends="high")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(rate, b1=config.b1, b2=config.b2))
