"""Parity of engines with PyTorch: run both from one checkpoint, compare rung by rung, report.

The reference (torch, diffusers, transformers) is imported only when a validation runs.
"""

from validate.options import ValidateOptions
from validate.run import validate

__all__ = ["ValidateOptions", "validate"]
