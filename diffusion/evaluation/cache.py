"""Keeps results in files: makes each once, checks it when it is read, and makes it again if the check fails."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from diffusion.errors import InputError
from diffusion.files import remove_temporaries

Result = TypeVar("Result")


def cached(
    path: str | os.PathLike,
    load: Callable[[Path], Result],
    make: Callable[[], Result],
    save: Callable[[Path, Result], None],
) -> Result:
    """Returns the result that the file holds, or else makes it and saves it there.

    A file that `load` refuses is replaced, with a warning. If the folder or file cannot be made, read or written there
    is a warning and no error, as the result is of use without it. Two processes that make the same file at once both
    have their result, and the file is whole.

    Args:
      path: the file; its folder is made if it is not there.
      load: reads the file; raises InputError if it is damaged or not the one wanted, OSError if it cannot be read.
      make: computes the result, which takes long.
      save: writes the file whole or not at all.

    Raises:
      InputError, or whatever else `make` raises.
    """
    path = Path(path)
    try:
        if path.exists():
            return load(path)
    except InputError as error:
        warnings.warn(f"{path} is made again: {error}", stacklevel=3)
    except OSError as error:
        warnings.warn(f"{path} cannot be read ({error.strerror or error}) and is made again", stacklevel=3)
    result = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path.parent, re.escape(path.name))
        save(path, result)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"{path} cannot be written ({reason}) and will have to be made again", stacklevel=3)
    return result
