"""Format quantities for people: bytes in a suitable unit, and nouns in singular or plural; parse bytes."""

import math
import re

from wan22.errors import UserError

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def human_bytes(size_bytes: float, digits: int = 2) -> str:
    """``13_737_984`` → "13.10 MiB"; below 1 KiB "412 B". ``digits`` is the number of decimals."""
    for unit, factor in UNITS:
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"


def parse_bytes(text: str, what: str) -> float:
    """``"8GiB"``, ``"8 GB"`` or ``"512MiB"`` in bytes; ``what`` is the option's name. All units are binary.

    Raises:
        UserError: ``text`` is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([KMG])i?B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"{what} {text!r}", "a size with its unit", f"write it as {what} 8GiB")
    return float(match[1]) * next(factor for unit, factor in UNITS if unit[0] == match[2].upper())


def size_option(size_bytes: float) -> str:
    """``size_bytes`` rounded up, as :func:`parse_bytes` reads it: "1.32GiB"."""
    unit, factor = next((each for each in UNITS if size_bytes >= each[1]), UNITS[-1])
    return f"{math.ceil(100 * size_bytes / factor) / 100:.2f}{unit}"


def counted(number: int, noun: str) -> str:
    """``1, "frame"`` → "1 frame"; ``81, "frame"`` → "81 frames"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def video_text(width: int, height: int, frames: int) -> str:
    """``832, 480, 1`` → "832x480, 1 frame"."""
    return f"{width}x{height}, {counted(frames, 'frame')}"
