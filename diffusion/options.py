"""Choices written as text, the one way for flags, configs and files: "name" or "name:key=value,key=value".

A name stands for a function of the library, such as a solver (schedule, tau, eta=0.0). The program fills in its first
parameters; all others are options, and the type of an option's default is the type that its text is read as.

A function of the user's own is named where Python finds it: "package.module:function" or
"package.module:function:key=value". Nothing here imports one.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion.errors import InputError, nearest

REQUIRED = inspect.Parameter.empty
"""Stands for the default of an option that has none."""

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_OWN = re.compile(rf"({_DOTTED}:[^\W\d]\w*)(?::(.*))?", re.DOTALL)


class Choice(NamedTuple):
    """One choice, read from text.

    Attributes:
      name: a key of the table it was looked up in.
      function: what that key stands for.
      options: the options that the text gives, parsed as the type of their default.
    """

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def complete(self, leading: int) -> dict[str, Any]:
        """Returns all options of the function, those that the text leaves out with their defaults."""
        return defaults(self.function, leading) | self.options

    def missing(self, leading: int) -> list[str]:
        """Names the options that have no default and that the text does not give; leading as for `parse`."""
        return [
            key
            for key, default in defaults(self.function, leading).items()
            if default is REQUIRED and key not in self.options
        ]


def defaults(function: Callable[..., Any], leading: int) -> dict[str, Any]:
    """Returns the options of a function with their defaults, in order; `REQUIRED` where there is none.

    Args:
      function: anything with a signature.
      leading: how many of its first parameters are no options, because the program fills them in.
    """
    parameters = list(inspect.signature(function).parameters.values())[leading:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def parse(what: str, text: str, known: Mapping[str, Callable[..., Any]], leading: int) -> Choice:
    """Reads one choice.

    An option's value may be a list: a part without an equals sign continues the value before it, as in
    "explicit:times=1000,500,250".

    Args:
      what: what to call the choice in errors, as "sampler".
      text: the choice.
      known: functions by name.
      leading: how many of their first parameters are no options.

    Raises:
      InputError: an unknown name or option, an option without a value or given twice, or a value of the wrong type.
    """
    name, _, settings = str(text).partition(":")
    if name not in known:
        raise InputError(f"{what} is {name!r}; {nearest(name, known)}")
    allowed = defaults(known[name], leading)
    texts: dict[str, str] = {}
    key = ""
    for part in filter(None, settings.split(",")):
        before, equals, value = part.partition("=")
        if not equals and not key:
            if part in allowed:
                raise InputError(f"{what} option {part!r} has no value; write {name}:{part}=VALUE")
            example = next(iter(allowed), "key")
            raise InputError(f"{what} option {part!r} has no name; write {name}:{example}={settings}")
        if not equals:
            texts[key] += f",{part}"
            continue
        key = before
        if key in texts:
            raise InputError(f"{what} {name} has its option {key!r} twice; give it once")
        if key not in allowed:
            valid = nearest(key, allowed) if allowed else "it has no options"
            raise InputError(f"{what} {name} has no option {key!r}; {valid}")
        texts[key] = value
    parameters = inspect.signature(known[name]).parameters
    options = {key: _value(f"{what} option {name}:{key}", text, parameters[key]) for key, text in texts.items()}
    return Choice(name, known[name], options)


def own_name(text: str) -> str:
    """Returns "package.module:function" if the text names a function of the user's own, with or without options.

    Returns "" for all other texts.
    """
    match = _OWN.fullmatch(str(text))
    return match[1] if match else ""


def parse_own(what: str, text: str, function: Callable[..., Any], first: tuple[str, ...]) -> Choice:
    """Reads the options of a function of the user's own, as `parse` does.

    Args:
      what: what to call the choice in errors, as "sampler".
      text: the choice, as "package.module:function:key=value".
      function: what the text names.
      first: the names of the parameters that the program fills in, for errors; the function may call them otherwise.

    Raises:
      InputError: a function that cannot take these parameters, or as `parse`; an option without a default is missing.
    """
    name = own_name(text)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # it is no function, or one without a signature
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(first):
        takes = ", ".join(p.name for p in parameters)
        raise InputError(f"{what} {name} takes ({takes}); it must take ({', '.join(first)}) and then its options")
    short = name.partition(":")[2]
    try:
        choice = parse(what, f"{short}:{_OWN.fullmatch(text)[2] or ''}", {short: function}, len(first))
    except InputError as error:
        raise InputError(str(error).replace(f"write {short}:", f"write {name}:")) from None
    if missing := choice.missing(len(first)):
        raise InputError(f"{what} {name} needs {missing[0]}; write {name}:{missing[0]}=VALUE")
    return choice._replace(name=name)


def write(choice: Choice, leading: int) -> str:
    """Writes a choice as text that `parse` reads, always the same for the same choice: defaults are left out."""
    chosen = {
        key: choice.options[key]
        for key, default in defaults(choice.function, leading).items()
        if key in choice.options and choice.options[key] != default
    }
    settings = ",".join(f"{key}={_text(value)}" for key, value in chosen.items())
    return f"{choice.name}:{settings}" if settings else choice.name


def split(text: str) -> list[str]:
    """Splits a list of choices: "ddim,dpm_solver_pp:order=3,variant=official,unipc" holds three.

    A part begins a new choice unless it is an option (it has an equals sign) or continues a list of numbers.
    """
    choices: list[str] = []
    for part in filter(None, re.split(r",(?![^()]*\))", text)):  # arguments in parentheses stay together
        if choices and ":" in choices[-1] and re.match(r"\w+=|[-+]?(\d|\.\d)[\d.]*(e[-+]?\d+)?$", part):
            choices[-1] += f",{part}"
        else:
            choices.append(part)
    return choices


def _value(what: str, text: str, parameter: inspect.Parameter) -> Any:
    """Parses an option's text as the type of its default; as a list of numbers, or else text, where there is none."""
    default = parameter.default
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise InputError(f"{what} is {text!r}; write true or false")
        return text.lower() == "true"
    whole = isinstance(default, int)
    try:
        numbers = tuple((int if whole else _number)(part) for part in text.split(","))
    except ValueError:
        if default is REQUIRED:
            return text
        raise InputError(f"{what} is {text!r}; write a {'whole ' if whole else ''}number") from None
    if isinstance(default, float) and len(numbers) == 1:
        return float(numbers[0])
    if isinstance(default, tuple) or default is REQUIRED:
        return numbers
    if len(numbers) > 1 and "Sequence" not in str(parameter.annotation):
        raise InputError(f"{what} is {text!r}; write one number")
    return numbers if len(numbers) > 1 else numbers[0]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
