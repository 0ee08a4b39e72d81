"""The layout of the weights file of a component in stages, stored beside it as JSON.

Components that share their stages have files of the same layout. Engines with slots for LoRAs take a LoRA as a second,
small file, an :class:`Overlay`, which replaces a part of every block's region.
"""

from math import prod
from pathlib import Path
from typing import TypeVar

import msgspec

from wan22.component import Tensor
from wan22.errors import DAMAGED_JSON, UserError

T = TypeVar("T")
LORA_DOWN, LORA_UP = "lora_down", "lora_up"  # the slots of a linear: [parts · rank, in] and [out, parts · rank]
LOW_RANK_DOWN, LOW_RANK_UP = "low_rank_down", "low_rank_up"  # of an NVFP4 matrix's branch: [rank, in] and [out, rank]
JOINED = ("qkv", "kv")  # linears stored as one
EMBEDDING = "token_embedding.weight"  # of a text encoder in stages: its rows are read one by one
FLOAT4 = "float4_e2m1fn"  # two numbers a byte
ITEM_BYTES = {"float8_e4m3fn": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int64": 8}  # by Tensor.dtype


class Place(msgspec.Struct, frozen=True):
    """The location of a weight in its component's file or in a block's region."""

    name: str
    offset: int
    size_bytes: int
    shape: tuple[int, ...]  # matrices [out, in]


def parts_of(linear: str) -> tuple[str, ...]:
    """The linears in the stored one: q, k and v of ``self_attn.qkv``."""
    module, _, name = linear.rpartition(".")
    return tuple(f"{module}.{part}" for part in name) if name in JOINED else (linear,)


def varies(name: str, shape: tuple[int, ...]) -> bool:
    """True for slots and vectors, which a LoRA at run time replaces, not for matrices."""
    return name.endswith((LORA_DOWN, LORA_UP)) or len(shape) != 2 or shape[0] == 1


def size_bytes(tensor: Tensor, **sizes: int) -> int:
    """The size of ``tensor`` for the given ``sizes`` of its named dimensions."""
    count = prod(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)
    return count // 2 if tensor.dtype == FLOAT4 else count * ITEM_BYTES[tensor.dtype]


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
    lora_rank: int = 0  # of the slots for LoRAs; then all that :func:`varies` is one piece around ``step_bytes``

    @property
    def size_bytes(self) -> int:
        return self.first_block + self.blocks * self.block_bytes

    def region(self, block: int) -> int:
        """The offset of a block's region in the file."""
        return self.first_block + block * self.block_bytes

    @property
    def varying(self) -> tuple[int, int]:
        """The first byte of a region that a LoRA may replace, and the byte behind the last."""
        places = [place for place in self.block if varies(place.name, place.shape)]
        return min(place.offset for place in places), max(place.offset + place.size_bytes for place in places)


class Overlay(msgspec.Struct, frozen=True):
    """A file that replaces parts of a weights file: some tensors around the blocks, and ``varying`` of every region."""

    ends: tuple[Place, ...]  # offsets in this file
    first_block: int  # offset of the first block's part in this file
    stride: int  # between the parts of two blocks

    def replaced(self, layout: BlockLayout) -> list[tuple[int, int, int]]:
        """Offset in the weights file, offset in this file and size of everything that is replaced."""
        ends = {place.name: place.offset for place in layout.ends}
        found = [(ends[place.name], place.offset, place.size_bytes) for place in self.ends]
        start, end = layout.varying
        blocks = range(layout.blocks)
        return found + [(layout.region(b) + start, self.first_block + b * self.stride, end - start) for b in blocks]


def write_block_layout(path: Path, layout: BlockLayout | Overlay) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(layout), indent=1))


def read_block_layout(path: Path) -> BlockLayout:
    """Raises UserError for a file that is not a layout of blocks."""
    return _read(path, BlockLayout)


def read_overlay(path: Path) -> Overlay:
    """Raises UserError for a file that is not the layout of an overlay."""
    return _read(path, Overlay)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except DAMAGED_JSON as error:
        raise UserError(f"{path}: {error}", "the layout of weights as built", "run wan-trt build again") from None
