"""The memory of components in stages: how many blocks stay resident, and in how many slices the tokens go.

Bytes per token and channel were measured on engines of both sizes for SM89 and SM120: they differ by less than 1 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from wan22.costs import block_parameters, matrices_bytes, vectors_bytes
from wan22.parts import DitSpec, TextEncoderSpec
from wan22.precision import Number, Precision
from wan22.specs import TEXT_TOKENS

WeightsIn = Literal["auto", "vram", "host", "disk"]  # where blocks are that are not at work
WEIGHTS_IN: tuple[WeightsIn, ...] = get_args(WeightsIn)
SLICES = (1, 2, 4, 8, 16)
PROMPTS = 2
TURNING = 2  # slots in which streamed blocks take turns


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


@dataclass(frozen=True)
class BlockStack:
    """Equal blocks that stay in memory or stream past, and the memory of one pass through them."""

    blocks: int
    step_bytes: float  # the weights of a block
    memory: Callable[[BlockChoice], BlockMemory]
    slices: tuple[int, ...] = SLICES

    @property
    def least(self) -> BlockChoice:
        return BlockChoice(min(TURNING, self.blocks), self.slices[-1])

    @property
    def most(self) -> BlockChoice:
        return BlockChoice(self.blocks, self.slices[0])

    def choose(self, budget: float, weights_in: WeightsIn = "auto") -> BlockChoice | None:
        """The choice for ``budget`` bytes; None if nothing fits.

        Fewer slices come first, as each reads the weights again, but only while two blocks fit: streaming is hidden
        behind the computation.
        """
        for slices in self.slices:
            room = int((budget - self.memory(BlockChoice(0, slices)).total) // self.step_bytes)
            wanted = {"auto": min(room, self.blocks), "vram": self.blocks}.get(weights_in, self.least.slots)
            if self.least.slots <= wanted <= room:
                return BlockChoice(wanted, slices)
        return None

    def smallest_budget(self, weights_in: WeightsIn = "auto") -> float:
        """The least memory in which a pass runs."""
        slots = self.blocks if weights_in == "vram" else self.least.slots
        return self.memory(BlockChoice(slots, self.slices[-1])).total


def transformer_blocks(
    spec: DitSpec, precision: Precision, tokens: int, step_bytes: float, groups: int = 1, *, beside: int = 0
) -> BlockStack:
    """The blocks of a transformer on one of ``groups`` devices that divide the ``tokens`` of a video.

    ``beside``: 16-bit products that are added to each linear's, one of slots for LoRAs and one of branches of low rank.
    """
    own = -(-tokens // groups)

    def memory(choice: BlockChoice) -> BlockMemory:
        return block_memory(spec, precision, own, choice, step_bytes, groups, beside=beside)

    return BlockStack(spec.layers, step_bytes, memory)


def text_layers(spec: TextEncoderSpec, precision: Precision, step_bytes: float) -> BlockStack:
    """The layers of a text encoder for the longest prompt."""
    wide, rows = precision.wide.linears.bits / 8, float(TEXT_TOKENS * spec.width)
    hidden, biases = 2.0 * TEXT_TOKENS * spec.ffn_width, 2.0 * spec.heads * TEXT_TOKENS**2
    scratch = 4 * (3 * rows + hidden) + wide * biases

    def memory(choice: BlockChoice) -> BlockMemory:
        return BlockMemory(3 * 4 * rows, 0.0, scratch, 0.0, choice.slots * step_bytes)

    return BlockStack(spec.layers, step_bytes, memory, SLICES[:1])


def block_memory(
    spec: DitSpec,
    precision: Precision,
    tokens: int,
    choice: BlockChoice,
    step_bytes: float,
    groups: int = 1,
    *,
    beside: int = 0,
) -> BlockMemory:
    """The memory of a forward with ``choice``; ``step_bytes`` are the weights of a block.

    ``tokens`` are those of one of ``groups`` devices, which keep what enters and leaves attention twice: all heads of
    these tokens, and some heads of all. The rows that they join of it come on top.
    """
    wide, rows = precision.wide.linears.bits / 8, float(tokens * spec.width)
    ratio, number = spec.ffn_width / spec.width, wide / 2
    in_codes = precision.quantised and precision.beside_feed_forward is not Number.NVFP4  # what enters O
    operands, attended = precision.attention.bits / 8, (1 if in_codes else wide)
    exchanged = 0.0 if groups == 1 else 3 * operands + 2 * wide
    qkv = 7.1 if in_codes else 8.6 if precision.quantised else 8.1 * number
    rest = 5.1 + 3 * ratio if precision.quantised else (4.7 + 4 * ratio) * number
    if precision.linears is Number.NVFP4:  # with products beside it the feed-forward decides alone
        rest = 0.5 + 6.1 * ratio if beside else 6.4 + 4 * ratio
    qkv, rest = qkv + beside * 3 * wide, rest + beside * ratio * wide
    attend = 6.1 if precision.attention.bits < 16 and not in_codes else 2 * number
    scratch = max(qkv / choice.slices, attend, rest / choice.slices, 4.1 / choice.slices)
    text = PROMPTS * spec.layers * 2 * TEXT_TOKENS * spec.width * wide
    residual = 4 * rows * (1 + 1 / choice.slices)  # slices go through an array of one slice
    edges = (3 * operands + attended + exchanged) * rows
    return BlockMemory(residual, edges, scratch * rows, text, choice.slots * step_bytes)


def block_step_bytes(spec: DitSpec, precision: Precision, low_rank: int = 0) -> float:
    """The weights of a block that a step reads: all but those of the text's keys and values.

    ``low_rank``: as for :func:`wan22.costs.matrices_bytes`.
    """
    block, stored = block_parameters(spec), precision.beside_feed_forward.stored_bits / 8
    wide = precision.wide.linears.bits / 8
    bias = 4 if precision.quantised else wide
    of_text = 2 * spec.width * (spec.width * stored + bias) + 4 * spec.width  # the norm of K too
    of_text += 4 * 2 * spec.width if precision.quantised else 0  # scales
    of_text += 2 * low_rank * 3 * spec.width if precision.beside_feed_forward is Number.NVFP4 else 0
    matrices = matrices_bytes(spec, precision, low_rank)
    return matrices + bias * block.bias + 4 * block.other + vectors_bytes(spec, precision) - of_text


def text_layer_bytes(spec: TextEncoderSpec, precision: Precision) -> float:
    """The weights of a layer of the text encoder; only feed-forward matrices can be in FP8."""
    wide, linears, inner = precision.wide.linears.bits / 8, precision.linears.bits / 8, spec.heads * spec.head_width
    attention = 4 * spec.width * inner + spec.buckets * spec.heads
    scales = 4 * (2 * spec.ffn_width + spec.width) if precision.quantised else 0
    return wide * attention + linears * 3 * spec.width * spec.ffn_width + scales + 4 * 2 * spec.width
