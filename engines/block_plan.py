"""A transformer and a text encoder in blocks on a card: what stays in its memory, and what streaming costs."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from wan22.block_memory import (
    TURNING,
    BlockChoice,
    BlockStack,
    block_step_bytes,
    text_layer_bytes,
    text_layers,
    transformer_blocks,
)
from wan22.precision import Precision
from wan22.specs import ModelSpec

CONTEXT_BYTES = 0.6 * 2**30  # of CUDA and small tensors, beside what is in blocks


@dataclass(frozen=True)
class BlockPlan:
    spec: ModelSpec
    precision: Precision  # of the transformer
    text_precision: Precision
    tokens: int
    usable_bytes: float  # of the card, or of --vram
    bus_gb_s: float  # from pinned host memory; 0 if unknown
    forward_seconds: float | None  # the roofline of a forward with all weights in memory
    low_rank: int = 0  # of the branches beside NVFP4 matrices

    @property
    def block_bytes(self) -> float:
        """The weights of one block that a step reads."""
        return block_step_bytes(self.spec.dit, self.precision, self.low_rank)

    @cached_property
    def stack(self) -> BlockStack:
        sizes, beside = (self.tokens, self.block_bytes), int(bool(self.low_rank))
        return transformer_blocks(self.spec.dit, self.precision, *sizes, beside=beside)

    @cached_property
    def choice(self) -> BlockChoice | None:
        """The choice on an otherwise empty card; None if not even streamed blocks fit."""
        return self.stack.choose(self.usable_bytes - CONTEXT_BYTES)

    @property
    def resident(self) -> int | None:
        """The blocks that stay in memory; None if nothing fits."""
        if self.choice is None:
            return None
        return self.choice.slots if self.choice.slots == self.stack.blocks else self.choice.slots - TURNING

    @property
    def text_slots(self) -> int | None:
        """The layers of the text encoder that are in memory at a time; None if not even two fit."""
        text = self.spec.text_encoder
        stack = text_layers(text, self.text_precision, text_layer_bytes(text, self.text_precision))
        choice = stack.choose(self.usable_bytes - CONTEXT_BYTES)
        return None if choice is None else choice.slots

    @property
    def least_bytes(self) -> float:
        """The least memory of a transformer in blocks."""
        return self.stack.smallest_budget() + CONTEXT_BYTES

    @property
    def copy_seconds(self) -> float | None:
        """The copy of a block from pinned host memory."""
        return self.block_bytes / (self.bus_gb_s * 1e9) if self.bus_gb_s else None

    @property
    def streamed_forward_seconds(self) -> float | None:
        """Roofline of a forward: a block that streams takes as long as its copy, if that is longer."""
        if self.forward_seconds is None or self.resident is None or self.copy_seconds is None:
            return None
        computed, blocks = self.forward_seconds, self.stack.blocks
        return max(computed, self.resident * computed / blocks + (blocks - self.resident) * self.copy_seconds)

    def as_json(self) -> dict[str, Any]:
        return {
            "block_bytes": self.block_bytes,
            "blocks": asdict(self.choice) if self.choice else None,
            "resident_blocks": self.resident,
            "text_layers_in_memory": self.text_slots,
            "block_copy_s": self.copy_seconds,
            "roofline_blocks_forward_s": self.streamed_forward_seconds,
            "least_blocks_vram_bytes": self.least_bytes,
        }
