"""Which expert a file's name speaks of, in the words that publishers use."""

import re

LETTERS = {"H": "high", "L": "low"}
NO_NOISE = r"[-_ ]?(?:res|rank|poly|key|light(?!ning|x2v)|quality|speed|motion|angle|vram|mem)"


def said(name: str) -> str | None:
    """Which of "high" and "low", if ``name`` says exactly one of them of noise, and not of rank or resolution."""
    found = set(re.findall(rf"(?<![a-z])(high|low)(?!{NO_NOISE})(?:[-_ ]?noise)?(?![a-z])", name.lower()))
    found |= {LETTERS[letter] for letter in re.findall(r"(?<![A-Za-z0-9])([HL])N?(?![A-Za-z0-9])", name)}
    return str(found.pop()) if len(found) == 1 else None
