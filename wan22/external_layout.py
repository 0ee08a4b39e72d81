"""The layout of a component's weights file, if weights are inputs of its engine (``--weights external``).

The layout is stored next to the engine as JSON; components that share an engine have files of the same layout.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from wan22.errors import DAMAGED_JSON, UserError


class Place(msgspec.Struct, frozen=True):
    """The location of a weight in its component's file."""

    name: str
    offset: int
    size_bytes: int
    shape: tuple[int, ...] = ()  # matrices [out, in]; empty in files of releases that stored [in, out]


def write_layout(path: Path, places: Sequence[Place]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(places), indent=1))


def read_layout(path: Path) -> list[Place]:
    """Raises UserError for a file that is not a layout."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Place])
    except DAMAGED_JSON as error:
        raise UserError(f"{path}: {error}", "the layout of weights as built", "run wan-trt build again") from None
