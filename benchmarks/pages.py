"""Writes tables into pages of the documentation, between the marks "<!-- KIND: NAME -->" and "<!-- KIND: end -->"."""

import sys
from collections.abc import Sequence
from pathlib import Path


def check(page: str | None, kind: str, name: str) -> None:
    """Ends the program, before its work, if a page that is asked for does not have these marks."""
    if page and any(mark not in Path(page).read_text() for mark in _marks(kind, name)):
        sys.exit(f"{page} has no lines {' and '.join(_marks(kind, name))}")


def write(page: str | None, kind: str, name: str, rows: Sequence[str]) -> None:
    """Replaces what is between the marks; does nothing where no page is asked for."""
    if page:
        begin, end = _marks(kind, name)
        before, rest = Path(page).read_text().split(begin, 1)
        Path(page).write_text("\n".join([before + begin, "", *rows, "", end]) + rest.split(end, 1)[1])


def _marks(kind, name):
    return f"<!-- {kind}: {name} -->", f"<!-- {kind}: end -->"
