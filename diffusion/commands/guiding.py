"""Reads the flags of classes and guidance, and refuses those that would have no effect."""

from collections.abc import Sequence
from typing import Any

from diffusion.commands import prompts
from diffusion.conditions import Prompts
from diffusion.errors import InputError, nearest
from diffusion.guidance import Guidance
from diffusion.model import Model, Trained


def interval(texts: Sequence[str] | None) -> tuple[float, float] | None:
    """Returns the times of --guidance_interval, or None where it is not given."""
    if texts is None:
        return None
    try:
        low, high = map(float, texts)
    except ValueError:
        raise InputError(f"guidance_interval is {','.join(texts)!r}; write LOW,HIGH as 100,700") from None
    return low, high


def check_effect(given: Any, trained: Trained, guides: bool) -> None:
    """Refuses flags that would have no effect, and guidance that the model has not learned.

    Args:
      given: all flags.
      trained: the model.
      guides: whether the guidance that they ask for acts.
    """
    guiding = [name for name in given if name.startswith("guidance_") and given[name].value != given[name].default]
    others = [name for name in guiding if name != "guidance_scale"]
    if trained.model.guides_itself:
        if others:
            raise InputError(
                f"--{others[0]} is for guidance in two calls, and this student takes the scale as an input; leave it "
                "out"
            )
        trained.model.conditions.check_scale(given.guidance_scale)
        guiding = []
    if guiding and given.guidance_model is None:
        check_learned(trained, guiding[0])
    if others and not guides:
        raise InputError(f"--{others[0]} does nothing at --guidance_scale=1; give a scale, or leave it out")
    if given.clip == "none" and given.dynamic_threshold is not None:
        raise InputError("--clip=none and --dynamic_threshold exclude each other; leave one out")


def check_learned(trained: Trained, flag: str) -> None:
    """Refuses guidance of a model that has not learned what no class means; the error names the flag."""
    if trained.model.conditions is None:
        raise InputError(f"this model has no classes: leave out --{flag}")
    if trained.config.train.label_dropout == 0:
        raise InputError(
            "this model was trained with config.train.label_dropout=0 and so has not learned what no class means, "
            f"which guidance needs: leave out --{flag}, or train with label_dropout above 0"
        )


def asked(given: Any) -> Guidance:
    """Returns the guidance that all flags ask for; raises InputError for one that no model can have."""
    guide = Guidance(
        scale=given.guidance_scale,
        interval=interval(given.guidance_interval),
        rescale=given.guidance_rescale,
        rule=given.guidance_rule,
    )
    guide.check(cond=None, acts=False)
    return guide


def settings(guide: Guidance) -> dict[str, Any]:
    """Returns what the flags say of guidance, for the record."""
    return {f"guidance_{name}": getattr(guide, name) for name in ("scale", "interval", "rescale", "rule")}


def labels(texts: Sequence[str] | None, model: Model) -> tuple[int, ...]:
    """Returns the classes that --labels names, by their names or, where no class is called that, their numbers."""
    if isinstance(model.conditions, Prompts):
        if texts is not None:
            raise InputError("--labels names classes, and this model is told prompts, which take turns; leave it out")
        return tuple(range(len(model.conditions.names)))
    if model.conditions is None:
        if texts:
            raise InputError("this model has no classes: leave out --labels")
        return ()
    names = list(model.conditions.names)
    numbers = {str(number): number for number in range(len(names))} | {name: i for i, name in enumerate(names)}
    if texts is None:
        return tuple(range(len(names)))
    if not texts:
        raise InputError("--labels is empty; name classes, or leave it out for all")
    if unknown := [text for text in texts if text.strip() not in numbers]:
        shown = names if names != list(numbers) else [f"0..{len(names) - 1}"]
        raise InputError(
            f"labels are {','.join(texts)!r}; there is no class {unknown[0]!r}; {nearest(unknown[0], shown)}"
        )
    return tuple(numbers[text.strip()] for text in texts)


MAX_NAMED = 5
"""The most classes that the title of a job names."""


def named(labels: Sequence[int], model: Model) -> str:
    """Returns " of " and the classes that images take in turn, or "" for a model without classes."""
    if len(labels) > MAX_NAMED:
        return f" of {len(labels)} {'prompts' if isinstance(model.conditions, Prompts) else 'classes'} in turn"
    names = (prompts.shortened(model.conditions.names[label]) for label in labels)
    return f" of {', '.join(names)}" if labels else ""
