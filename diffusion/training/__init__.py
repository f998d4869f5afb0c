"""Trains a model: the step, the loop, checkpoints, and the folder that holds a run."""
