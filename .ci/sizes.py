"""Fails where a function has more than 50 lines or a module more than 320: `python .ci/sizes.py`; tests/ may be long.

The lines of a function count without its docstring. What may be longer stands with its reason under [tool.sizes] in
pyproject.toml, "FILE" or "FILE::FUNCTION", and so does each function that ruff is told to leave its many arguments.
"""

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FUNCTION_LINES, MODULE_LINES, EXCEPTIONS = 50, 320, 5
SKIPPED = {"tests", "build", "dist", "site", "jupyter_execute", ".venv"}


def code_lines(function: ast.FunctionDef) -> int:
    """Returns how many lines a function has, decorators and docstring left out."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - has_docstring * (first.end_lineno - first.lineno + 1)


def offenders(path: Path):
    """Yields (name, what is wrong) for a file and each of its functions that is above a limit."""
    source = path.read_text()
    lines, name = source.splitlines(), path.relative_to(ROOT).as_posix()
    if len(lines) > MODULE_LINES:
        yield name, f"has {len(lines)} lines; {MODULE_LINES} are the limit"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (length := code_lines(node)) > FUNCTION_LINES:
                yield f"{name}::{node.name}", f"has {length} lines; {FUNCTION_LINES} are the limit"
            if "PLR0913" in lines[node.lineno - 1]:
                yield f"{name}::{node.name}", "is excepted from ruff's limit of arguments"


paths = [path for path in sorted(ROOT.rglob("*.py")) if not SKIPPED & set(path.relative_to(ROOT).parts)]
found = [offence for path in paths for offence in offenders(path)]
allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["sizes"]["exceptions"]
wrong = [f"{name} {what}" for name, what in found if name not in allowed]
wrong += [f"{name} is no exception any more; take it out" for name in allowed if name not in dict(found)]
wrong += [f"{len(allowed)} exceptions are more than {EXCEPTIONS}"] * (len(allowed) > EXCEPTIONS)
sys.exit("\n".join(wrong) or None)
