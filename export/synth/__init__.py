"""Synthetic checkpoints with random weights, in both published layouts."""
