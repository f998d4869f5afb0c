"""Fits samplers to a trained network and its data."""
