"""Keeps results in files: makes each once, checks it when it is read, and makes it again if the check fails."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from diffusion.errors import InputError

Result = TypeVar("Result")


def cached(
    path: str | os.PathLike,
    load: Callable[[Path], Result],
    make: Callable[[], Result],
    save: Callable[[Path, Result], None],
) -> Result:
    """Returns the result that the file holds, or else makes it and saves it there.

    A file that `load` refuses is replaced, with a warning. If the file cannot be written there is a warning and no
    error, as the result is of use without it.

    Args:
      path: the file; its folder is made if it is not there.
      load: reads the file; raises InputError if it is damaged or not the one wanted.
      make: computes the result, which takes long.
      save: writes the file whole or not at all.

    Raises:
      InputError: the folder cannot be made. Whatever `make` raises comes through as well.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {path.parent} cannot be made ({error.strerror}); choose another") from error
    if path.exists():
        try:
            return load(path)
        except InputError as error:
            warnings.warn(f"{path} is made again: {error}", stacklevel=3)
    result = make()
    try:
        save(path, result)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror}) and will have to be made again", stacklevel=3)
    return result
