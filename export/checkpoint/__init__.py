"""Wan2.2 checkpoints: the published layouts, their tensor names, and what they say about the model."""
