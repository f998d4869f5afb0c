"""Draws samples from a trained run: `python -m diffusion.sample` is `python sample.py` without a clone."""

import sys

import diffusion
from diffusion.commands import sample

if __name__ == "__main__":
    sample.launch()
else:
    # The name `diffusion.sample` belongs to the function, also where a tool imports every module of the package.
    sys.modules[__name__] = diffusion.sample
