"""Reads --cache: in which network calls the deep levels are computed."""

from diffusion.arguments import check_cache
from diffusion.caching import Cache
from diffusion.errors import InputError
from diffusion.guidance import Guidance
from diffusion.model import Model
from diffusion.solvers import SamplerTable


def calls(text: str) -> int | tuple[int, ...]:
    """Returns k of a single number, or the numbers of the calls where there is a comma.

    Raises:
      InputError: anything else.
    """
    parts = text.removesuffix(",").split(",")  # "0," is the list of one call
    if not all(part.strip().isascii() and part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"cache is {text!r}; write a number k as 3, or calls with commas as 0,3,6,9")
    numbers = tuple(map(int, parts))
    return numbers if "," in text else numbers[0]


def asked(text: str | None, model: Model, table: SamplerTable, guidance: Guidance) -> Cache | None:
    """Returns the cache that --cache asks for, or None; raises InputError where a network or the table has no use."""
    if text is None:
        return None
    cache = Cache(model.split, calls(text))
    check_cache(cache, table, guidance if guidance.acts() else None)
    return cache
