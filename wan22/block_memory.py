"""The memory of a transformer in stages: how many blocks stay resident, and in how many slices the tokens go.

Bytes per token and channel were measured on engines of both sizes for SM89 and SM120: they differ by less than 1 %.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from wan22.costs import block_parameters
from wan22.parts import DitSpec
from wan22.specs import TEXT_TOKENS, Precision

WeightsIn = Literal["auto", "vram", "host", "disk"]  # where blocks are that are not at work
WEIGHTS_IN: tuple[WeightsIn, ...] = get_args(WeightsIn)
SLICES = (1, 2, 4, 8, 16)
PROMPTS = 2
TURNING = 2  # slots in which streamed blocks take turns


def least_slots(spec: DitSpec) -> int:
    return min(TURNING, spec.layers)


@dataclass(frozen=True)
class BlockChoice:
    slots: int  # blocks whose weights are in memory
    slices: int  # of the tokens, for the stages that need no other tokens


@dataclass(frozen=True)
class BlockMemory:
    """The memory of one forward, in bytes."""

    x: float
    edges: float  # q, k, v and the output of attention
    scratch: float
    text: float  # keys and values of both prompts, of all blocks
    slots: float

    @property
    def total(self) -> float:
        return self.x + self.edges + self.scratch + self.text + self.slots


def block_memory(
    spec: DitSpec, precision: Precision, tokens: int, choice: BlockChoice, step_bytes: float
) -> BlockMemory:
    """The memory of a forward of ``tokens`` with ``choice``; ``step_bytes`` are the weights of a block."""
    wide, rows = precision.wide.linears.bits / 8, float(tokens * spec.width)
    ratio, number = spec.ffn_width / spec.width, wide / 2
    operands, attended = precision.attention.bits / 8, (1 if precision.quantised else wide)
    qkv = 7.1 if precision.quantised else 8.1 * number
    rest = 5.1 + 3 * ratio if precision.quantised else (4.7 + 4 * ratio) * number
    scratch = max(qkv / choice.slices, 2 * number, rest / choice.slices, 4.1 / choice.slices)
    text = PROMPTS * spec.layers * 2 * TEXT_TOKENS * spec.width * wide
    residual = 4 * rows * (1 + 1 / choice.slices)  # slices go through an array of one slice
    return BlockMemory(residual, (3 * operands + attended) * rows, scratch * rows, text, choice.slots * step_bytes)


def choose_blocks(
    spec: DitSpec, precision: Precision, tokens: int, step_bytes: float, budget: float, weights_in: WeightsIn = "auto"
) -> BlockChoice | None:
    """The choice for ``budget`` bytes; None if nothing fits.

    Fewer slices come first, as each reads the weights again, but only while two blocks fit: streaming is hidden behind
    the computation.
    """
    for slices in SLICES:
        least = BlockChoice(0, slices)
        room = int((budget - block_memory(spec, precision, tokens, least, step_bytes).total) // step_bytes)
        slots = {"auto": min(room, spec.layers), "vram": spec.layers}.get(weights_in, least_slots(spec))
        if least_slots(spec) <= slots <= room:
            return BlockChoice(slots, slices)
    return None


def smallest_budget(
    spec: DitSpec, precision: Precision, tokens: int, step_bytes: float, weights_in: WeightsIn = "auto"
) -> float:
    """The least memory in which a forward runs."""
    slots = spec.layers if weights_in == "vram" else least_slots(spec)
    return block_memory(spec, precision, tokens, BlockChoice(slots, SLICES[-1]), step_bytes).total


def block_step_bytes(spec: DitSpec, precision: Precision) -> float:
    """The weights of a block that a step reads: all but those of the text's keys and values."""
    block, stored, wide = block_parameters(spec), precision.linears.bits / 8, precision.wide.linears.bits / 8
    bias = 4 if precision.quantised else wide
    of_text = 2 * spec.width * (spec.width * stored + bias) + 4 * spec.width  # the norm of K too
    return stored * block.linear + bias * block.bias + 4 * block.other - of_text
