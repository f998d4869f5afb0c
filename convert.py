"""Writes a trained run to one file; the program is diffusion/commands/convert.py, and --help lists its flags."""

from diffusion.commands import convert

if __name__ == "__main__":
    convert.launch()
