"""The one exception for what a user can put right."""

import difflib
import numbers
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong argument, flag, config field, file or checkpoint.

    The message is one line: what was given, what is allowed, what to do. Entry points print it and exit with code 2.
    """


def is_whole(value: object) -> bool:
    """Whether value is a whole number: 3, 3.0 or a NumPy integer, not NaN, not True, not "3"."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error message: the nearest valid name, if any is near, and all valid names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}valid: {', '.join(known)}"
