"""The layout of the weights file of a component in stages, stored beside it as JSON.

Components that share their stages have files of the same layout.
"""

from math import prod
from pathlib import Path

import msgspec

from wan22.bundle import Tensor
from wan22.errors import DAMAGED_JSON, UserError

EMBEDDING = "token_embedding.weight"  # of a text encoder in stages: its rows are read one by one
ITEM_BYTES = {"float8_e4m3fn": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int64": 8}  # by Tensor.dtype


class Place(msgspec.Struct, frozen=True):
    """The location of a weight in its component's file or in a block's region."""

    name: str
    offset: int
    size_bytes: int
    shape: tuple[int, ...]  # matrices [out, in]


def size_bytes(tensor: Tensor, **sizes: int) -> int:
    """The size of ``tensor`` for the given ``sizes`` of its named dimensions."""
    return prod(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims) * ITEM_BYTES[tensor.dtype]


class BlockLayout(msgspec.Struct, frozen=True):
    """The layout of the weights of a transformer in stages: what surrounds the blocks, then one region per block.

    All regions have the same size and offsets. The weights that are used once per prompt come last in each, so that a
    step reads only its first ``step_bytes``.
    """

    ends: tuple[Place, ...]  # offsets in the file
    block: tuple[Place, ...]  # offsets in a block's region
    blocks: int
    first_block: int  # offset of the first region
    block_bytes: int  # size of a region, a multiple of a page
    step_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.first_block + self.blocks * self.block_bytes


def write_block_layout(path: Path, layout: BlockLayout) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(layout), indent=1))


def read_block_layout(path: Path) -> BlockLayout:
    """Raises UserError for a file that is not a layout of blocks."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BlockLayout)
    except DAMAGED_JSON as error:
        raise UserError(f"{path}: {error}", "the layout of weights as built", "run wan-trt build again") from None
