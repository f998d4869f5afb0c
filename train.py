"""Trains a diffusion model; the program is diffusion/commands/train.py, and --help lists its flags."""

from diffusion.commands import train

if __name__ == "__main__":
    train.launch()
