"""Measures a trained model: `python -m diffusion.evaluate` is `python evaluate.py` without a clone."""

from diffusion.commands import evaluate

if __name__ == "__main__":
    evaluate.launch()
