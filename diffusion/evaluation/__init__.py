"""Measures a model: how near its samples come to real images, and how likely it finds images."""

from diffusion.evaluation.samples import Samples, load_samples

__all__ = ["Samples", "load_samples"]
