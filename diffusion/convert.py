"""Writes a trained run to one file: `python -m diffusion.convert` is `python convert.py` without a clone."""

from diffusion.commands import convert

if __name__ == "__main__":
    convert.launch()
