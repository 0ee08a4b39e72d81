"""Parity of engines with PyTorch: run both from one checkpoint, compare rung by rung, report.

The reference (torch, diffusers, transformers) is imported only when a validation runs.
"""

from validate.run import ValidateOptions, validate

__all__ = ["ValidateOptions", "validate"]
