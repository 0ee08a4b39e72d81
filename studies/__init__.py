"""Experiments over the public API, outside the wheel: run them from a checkout."""
