"""What a checkpoint quantised for FP8 brings: static input scales, and blocks in 16 bits."""

from dataclasses import dataclass

from export.checkpoint.checkpoint import Weights
from export.files.decoded import Codes

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
            scales = [codes.entering for codes in found if isinstance(codes, Codes) and codes.entering is not None]
            if len(scales) == len(inputs):
                entering |= {f"blocks.{block}.{linear}": max(scales) for linear in inputs}
    calibrated = {int(linear.split(".")[1]) for linear in entering}
    return Published(entering, frozenset(range(layers)) - calibrated if calibrated else frozenset())
