"""Imports functions of the user's own, named as package.module:function, and only those that the user has named.

A run folder or a weights file can come from a stranger, and importing a module runs it. So what such a file names is
never imported unless the command line names it as well.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion import options
from diffusion.errors import InputError, nearest, users_code
from diffusion.model import TRANSFORMER, UNET, UNET2D


def load(what: str, text: str) -> Callable[..., Any]:
    """Imports the function that a text names; the folder that the command runs in is searched first.

    Args:
      what: what to call it in errors, as "network".
      text: "package.module:function", with or without options. The user must have said it, by flag or config.

    Raises:
      InputError: there is no such module or function, or the module fails while it is imported.
    """
    name = options.own_name(text)
    if not name:
        raise InputError(f"{what} is {text!r}; write package.module:function, with options after another colon")
    module_name, function_name = name.split(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    with users_code(f"{what} {name}: importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # it is missing to the user's module
            hint = "write the module without .py" if function_name == "py" or module_name.endswith(".py") else ""
            hint = hint or "start in its folder, or put that on PYTHONPATH"
            raise InputError(
                f"{what} {name}: there is no module {error.name} in {here} or on Python's path; {hint}"
            ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        where = f"module {module_name} has no function {function_name!r}"
        raise InputError(f"{what} {name}: {where}; {nearest(function_name, known)}")
    return function


def networks(text: str | None) -> dict[str, Callable[..., Any]]:
    """Imports the network that the user has named: {name: function}, as `make_model` takes it, or {} for the UNet."""
    name = options.own_name(text or "")
    return {name: load("network", text)} if name else {}


def flag(text: str) -> str:
    """Returns what later commands need for a run with this config.network: " --network=NAME", or "" for the UNet."""
    name = options.own_name(text)
    return f" --network={name}" if name else ""


def check_used(text: str | None, *configs: Mapping[str, Any]) -> None:
    """Raises InputError if no trained model has the network that --network names.

    Args:
      text: the flag, None if it is not given.
      configs: the whole config of each model that the program has opened.
    """
    saved = [config.network for config in configs]
    if text is None or any(text in (name, options.own_name(name)) for name in saved):
        return
    right = [options.own_name(name) for name in saved if options.own_name(name)]
    remedy = f"write --network={right[0]}" if right else "leave out --network"
    raise InputError(f"--network is {text!r}, but the model was trained with {saved[0]!r}; {remedy}")


def check_network_fields(text: str, argv: Sequence[str]) -> None:
    """Raises InputError if the command line sets arguments of another network than config.network names.

    Args:
      text: config.network.
      argv: the arguments of the command line. All networks take config.model.num_classes.
    """
    sections = {UNET: "config.model.", TRANSFORMER: "config.transformer.", UNET2D: "config.unet2d."}
    given = [arg.lstrip("-").partition("=")[0] for arg in argv]
    for network, section in sections.items():
        fields = [field for field in given if field.startswith(section) and field != "config.model.num_classes"]
        if not fields or network == text:
            continue
        field, option = fields[0], fields[0].removeprefix(section)
        if name := options.own_name(text):
            raise InputError(f"{field} is for network {network}; an option of your own is {name}:{option}=VALUE")
        remedy = f"write {sections[text]}{option}" if text in sections else f"leave it out, or take network {network}"
        raise InputError(f"{field} is for network {network}, and config.network is {text}; {remedy}")


def stored(what: str, flag: str, given: str | None, saved: str) -> str:
    """Returns what a flag gives, or else what the run's config has, unless that would import code nobody asked for.

    Raises:
      InputError: the run's choice is a function of its author's own, and the flag does not name it.
    """
    if given is None and any(map(options.own_name, options.split(saved))):  # evaluate.py splits it as well
        raise InputError(
            f"the {what} of this run is {saved}, Python code that does not come with it; if you trust that code, name "
            f"it: --{flag}={saved}, or choose another {what}"
        )
    return saved if given is None else given
