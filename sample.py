"""Draws samples from a trained run; the program is diffusion/commands/sample.py, and --help lists its flags."""

from diffusion.commands import sample

if __name__ == "__main__":
    sample.launch()
