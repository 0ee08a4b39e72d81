"""Options that several subcommands share, and the reading of what users type into them."""

import re
from pathlib import Path
from typing import Annotated

import typer

from wan22.errors import UserError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of the same kind.")]
Size = Annotated[str | None, typer.Option("--size", help="Width x height in pixels, such as 832x480.")]
Frames = Annotated[int | None, typer.Option("--frames", help="Video frames, a multiple of 4 plus 1.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="The noise torch.Generator makes of it.")]
Folder = Annotated[Path, typer.Argument(file_okay=False, show_default=False)]


def size_of(text: str | None) -> tuple[int, int] | None:
    """``"832x480"`` → (832, 480)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[x×*](\d{1,5})", text.strip())
    if not match:
        raise UserError(f"size {text!r}", "width x height in pixels", "write it as 832x480")
    return int(match[1]), int(match[2])


def numbers_of(text: str) -> frozenset[int]:
    """``"0-2,39"`` → {0, 1, 2, 39}."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        if not match:
            raise UserError(f"blocks {text!r}", "numbers and ranges", "write them as 0-2,39")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)
