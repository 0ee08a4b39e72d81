"""Parity of engines with PyTorch: run both from one checkpoint, compare them rung by rung, write a report.

The reference (torch, diffusers, transformers) is imported only when a validation runs.
"""

from validate.options import ValidateOptions, official_wheel
from validate.run import validate

__all__ = ["ValidateOptions", "official_wheel", "validate"]
