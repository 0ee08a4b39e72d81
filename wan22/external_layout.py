"""Where the weights of a component lie in their file, when they are inputs of its engine (``--weights external``).

The layout lies beside the engine as JSON; components that share an engine have weight files of the same layout.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec


class Place(msgspec.Struct, frozen=True):
    """Where a weight lies in the file of its component."""

    name: str
    offset: int
    size_bytes: int


def write_layout(path: Path, places: Sequence[Place]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(places), indent=1))


def read_layout(path: Path) -> list[Place]:
    return msgspec.json.decode(path.read_bytes(), type=list[Place])
