"""Measures a model: how near its samples come to real images, and how likely it finds images."""
