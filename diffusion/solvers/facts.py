"""Says what the facts of a table may be: it comes from anybody, and programs compare, print and store its facts."""

from typing import Any

MAX_NUMBER = 2.0**63
"""The largest number among the facts; Python can read larger ones from JSON than it can print."""


def check_facts(facts: Any) -> None:
    """Raises ValueError unless facts are texts, numbers, true, false, null and lists of these, by name."""
    if not isinstance(facts, dict):
        raise ValueError("its facts are no object")
    for name, value in facts.items():
        if not all(_is_plain(part) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"its fact {name[:40]!r} is neither a text nor a number, nor a list of these")


def _is_plain(value):
    if isinstance(value, int | float):
        return abs(value) <= MAX_NUMBER  # which NaN is not
    return value is None or isinstance(value, str)
