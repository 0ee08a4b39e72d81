"""What a checkpoint quantised for FP8 brings: static input scales, blocks in 16 bits, codes with scales for rows."""

from collections.abc import Iterable
from dataclasses import dataclass

from export.checkpoint.checkpoint import Weights
from export.quantise.fp8_weights import scales_differ

SAME_INPUT = (  # groups of a block's linears that read the same input; FP8 graphs store each group as one matrix
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("cross_attn.q",),
    ("cross_attn.k", "cross_attn.v"),
    ("cross_attn.o",),
    ("ffn.0",),
    ("ffn.2",),
)


@dataclass(frozen=True)
class Published:
    """``input_scales`` by linear ("blocks.0.ffn.0"); ``wide_blocks`` are those that the publisher did not quantise."""

    input_scales: dict[str, float]
    wide_blocks: frozenset[int]


def published(weights: Weights, layers: int) -> Published:
    """The calibration of an expert. Linears that read the same input get the largest of their scales."""
    entering: dict[str, float] = {}
    for block in range(layers):
        for inputs in SAME_INPUT:
            found = [weights.codes(f"blocks.{block}.{linear}.weight") for linear in inputs]
            scales = [codes.entering for codes in found if codes is not None and codes.entering is not None]
            if len(scales) == len(inputs):
                entering |= {f"blocks.{block}.{linear}": max(scales) for linear in inputs}
    calibrated = {int(linear.split(".")[1]) for linear in entering}
    return Published(entering, frozenset(range(layers)) - calibrated if calibrated else frozenset())


def row_scaled(experts: Iterable[Weights], layers: int) -> frozenset[str]:
    """The matrices of a block ("self_attn.qkv") whose stored codes have different scales for rows, in any block.

    All blocks of all experts get the same graph.
    """
    found = set()
    for weights in experts:
        for block in range(layers):
            for inputs in SAME_INPUT:
                codes = [weights.codes(f"blocks.{block}.{linear}.weight") for linear in inputs]
                kept = [each for each in codes if each is not None]
                if len(kept) == len(codes) and scales_differ(kept):
                    found.add(stored_name(inputs))
    return frozenset(found)


def stored_name(inputs: tuple[str, ...]) -> str:
    """("cross_attn.k", "cross_attn.v") → "cross_attn.kv"."""
    return inputs[0] + "".join(linear.rpartition(".")[2] for linear in inputs[1:])
