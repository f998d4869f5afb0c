"""Measures a trained model; the program is diffusion/commands/evaluate.py, and --help lists its flags."""

from diffusion.commands import evaluate

if __name__ == "__main__":
    evaluate.launch()
