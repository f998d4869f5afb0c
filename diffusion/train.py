"""Trains a diffusion model: `python -m diffusion.train` is `python train.py` without a clone."""

from diffusion.commands import train

if __name__ == "__main__":
    train.launch()
