"""Finds the configs that come with the project: in configs/ of a clone, or in the installed package."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from ml_collections import ConfigDict

_PACKAGE = Path(__file__).parents[1]
NAME = "configs"

# setup.py installs the folder configs/ as diffusion/configs.
FOLDER = next(path for path in (_PACKAGE / NAME, _PACKAGE.parent / NAME) if (path / "default.py").is_file())
"""The folder of the configs."""


def find(path: str) -> str:
    """Returns the path of a config, which may have an argument after a colon: where it is, or else among those of ours.

    So --config=configs/digits.py needs no clone. A path that is nowhere is returned as it is.
    """
    file, colon, argument = path.partition(":")
    ours = FOLDER.parent / file
    if Path(file).exists() or Path(file).parts[:1] != (NAME,) or not ours.is_file():
        return path
    return f"{ours}{colon}{argument}"


def names() -> list[str]:
    """Returns the configs that come with the project, as `find` takes them."""
    return sorted(f"{NAME}/{path.name}" for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "default"))


def alias() -> None:
    """Makes `from configs import default` in a config file mean our configs, wherever the program is started.

    A folder configs/ of the user's own where it is started is searched after ours.
    """
    package = sys.modules.get(NAME)
    if package is not None and os.path.abspath(next(iter(package.__path__), "")) == str(FOLDER):
        return
    spec = importlib.util.spec_from_file_location(
        NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER), os.path.abspath(NAME)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)


def defaults() -> ConfigDict:
    """Returns the config with every field at its default."""
    return runpy.run_path(str(FOLDER / "default.py"))["get_config"]()
