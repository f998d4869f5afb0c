"""Defines the one exception for what a user can put right, checks that raise it, and how names are shown."""

import contextlib
import difflib
import math
import numbers
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """Reports a wrong argument, flag, config field, file or checkpoint.

    The message is one line: what was given, what is allowed, what to do. Entry points print it and exit with code 2.
    """


def require_range(name: str, value: float, low: float, high: float = math.inf, *, open_ends: str = "") -> None:
    """Raises InputError unless low <= value <= high; NaN is never in range.

    Args:
      name: what the message calls the value, for example "config.optimizer.b1".
      value: a number.
      low, high: the range.
      open_ends: "low", "high" or "low, high": the ends that are themselves not allowed.
    """
    inside = isinstance(value, numbers.Real) and low <= value <= high
    if inside and not ("low" in open_ends and value == low) and not ("high" in open_ends and value == high):
        return
    first, last = (str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high))
    if high == math.inf:
        allowed = f"above {first}" if "low" in open_ends else f"at least {first}"
    else:
        excluded = [f"without {end}" for end, word in ((first, "low"), (last, "high")) if word in open_ends]
        allowed = ", ".join([f"in {first}..{last}", *excluded])
    raise InputError(f"{name} is {value}; it must be {allowed}")


def is_whole(value: object) -> bool:
    """Says whether value is a whole number: 3, 3.0 or a NumPy integer, but not NaN, True or "3"."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest valid name, if one is near, and all valid names."""
    known = sorted(known)
    lower = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    guess = f"did you mean {lower[close[0]]!r}? " if close else ""
    return f"{guess}valid: {', '.join(known)}"


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turns an error in the user's own code into an InputError of one line; what says which code it is."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} fails with {failure(error)}") from error


def failure(error: BaseException) -> str:
    """Describes an error in the user's own code in one line: what it is, and where in that code it arose."""
    ours = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not re.search(r"site-packages|<frozen", f.filename) and ours not in f.filename]
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}, line {error.lineno})"
    else:
        place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    said = str(error.msg if isinstance(error, SyntaxError) else error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {said}{place}" if said else f"{type(error).__name__}{place}"


def printable(text: str) -> str:
    """Returns text as a terminal can show it: what is not printable, such as an escape, is written out as \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
