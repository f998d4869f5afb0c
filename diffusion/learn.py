"""Learns samplers of few steps: `python -m diffusion.learn` is `python learn.py` without a clone."""

from diffusion.commands import learn

if __name__ == "__main__":
    learn.launch()
