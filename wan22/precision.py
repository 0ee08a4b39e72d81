"""Precisions: a number type for linears and one for attention."""

from collections.abc import Collection
from enum import StrEnum

from wan22.errors import UserError


class Number(StrEnum):
    """A number type of matrix multiplications."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"  # E4M3
    INT8 = "int8"
    NVFP4 = "nvfp4"  # E2M1, with an E4M3 scale for 16 of them

    @property
    def bits(self) -> int:
        return _BITS[self][0]

    @property
    def stored_bits(self) -> float:
        """Bits of a stored number, with its share of the scale that 16 numbers have in NVFP4."""
        return self.bits + 8 / 16 if self is Number.NVFP4 else self.bits

    @property
    def wide(self) -> "Number":
        """The type of what is not quantised beside it; itself for 16 bits and more."""
        return Number.BF16 if self.bits < 16 else self

    @property
    def smoothed(self) -> bool:
        """True if its inputs are multiplied by factors: its codes are evenly spaced, or there are few of them."""
        return self in (Number.INT8, Number.NVFP4)

    @property
    def significand(self) -> int:
        """Bits of the significand, including the leading one; those of INT8 are of the largest value of a row."""
        return _BITS[self][1]


_BITS = {
    Number.FP32: (32, 24), Number.BF16: (16, 8), Number.FP16: (16, 11), Number.FP8: (8, 4), Number.INT8: (8, 7),
    Number.NVFP4: (4, 2),
}  # fmt: skip


class Precision(StrEnum):
    """The precision of a component's matrix multiplications. Sensitive parts always stay in float32.

    Code uses the properties instead of comparing members, so that a new precision only needs a new row in ``_AXES``.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"  # FP8 linears, 16-bit attention
    FP8_ATTN = "fp8-attn"  # FP8 linears and attention
    INT8 = "int8"  # INT8 linears, 16-bit attention
    INT8_FP8_ATTN = "int8+fp8-attn"  # INT8 linears, FP8 attention
    NVFP4 = "nvfp4"  # NVFP4 linears, 16-bit attention
    NVFP4_FP8_ATTN = "nvfp4+fp8-attn"  # NVFP4 linears, FP8 attention
    NVFP4_FFN = "nvfp4-ffn"  # NVFP4 in the feed-forward, INT8 in other linears, 16-bit attention
    NVFP4_FFN_FP8_ATTN = "nvfp4-ffn+fp8-attn"  # the same with FP8 attention

    @property
    def linears(self) -> Number:
        """The number type of linears and of their stored weights."""
        return _AXES[self][0]

    @property
    def attention(self) -> Number:
        """The number type of attention."""
        return _AXES[self][1]

    @property
    def beside_feed_forward(self) -> Number:
        """The number type of the other linears of a block, where :attr:`linears` is that of the feed-forward alone."""
        return _BESIDE.get(self, self.linears)

    @property
    def wide(self) -> "Precision":
        """The precision of everything except quantised linears and attention; itself if nothing is quantised."""
        return Precision.BF16 if self.quantised else self

    @property
    def quantised(self) -> bool:
        """True if weights of linears are stored in fewer than 16 bits, with scales."""
        return self.linears.bits < 16

    @property
    def significand(self) -> tuple[int, int]:
        """Significand bits of linears and attention; fewer bits are coarser."""
        return self.linears.significand, self.attention.significand


_AXES = {  # linears, attention
    Precision.FP32: (Number.FP32, Number.FP32),
    Precision.BF16: (Number.BF16, Number.BF16),
    Precision.FP16: (Number.FP16, Number.FP16),
    Precision.FP8: (Number.FP8, Number.BF16),
    Precision.FP8_ATTN: (Number.FP8, Number.FP8),
    Precision.INT8: (Number.INT8, Number.BF16),
    Precision.INT8_FP8_ATTN: (Number.INT8, Number.FP8),
    Precision.NVFP4: (Number.NVFP4, Number.BF16),
    Precision.NVFP4_FP8_ATTN: (Number.NVFP4, Number.FP8),
    Precision.NVFP4_FFN: (Number.NVFP4, Number.BF16),
    Precision.NVFP4_FFN_FP8_ATTN: (Number.NVFP4, Number.FP8),
}
LOW_RANKS = range(16, 129, 16)  # of 16-bit branches beside NVFP4 matrices
_BESIDE = dict.fromkeys((Precision.NVFP4_FFN, Precision.NVFP4_FFN_FP8_ATTN), Number.INT8)


def precision_named(text: str) -> Precision:
    """The precision called ``text``.

    Raises:
        UserError: there is none, with the reason if it is one of INT8 attention.
    """
    if text in list(Precision):
        return Precision(text)
    found, remedy = f"precision {text!r}", "choose one of these"
    if text.endswith("int8-attn"):
        found += " (in INT8, every form of attention that compilers take stores a matrix of tokens by tokens)"
        remedy = f"use {Precision.INT8_FP8_ATTN} on Ada and Blackwell, {Precision.INT8} elsewhere"
    raise UserError(found, f"one of {', '.join(Precision)}", remedy)


def check_low_rank(rank: int, linears: Collection[Number]) -> None:
    """Raise UserError for a ``rank`` of branches beside NVFP4 that none can have, or without NVFP4 in ``linears``."""
    if rank and Number.NVFP4 not in linears:
        expected = f"a transformer in {Precision.NVFP4} or {Precision.NVFP4_FFN}"
        raise UserError(f"--low-rank {rank} without NVFP4", expected, "leave --low-rank out")
    if rank and rank not in LOW_RANKS:
        expected = f"a multiple of {LOW_RANKS.step} from {LOW_RANKS[0]} to {LOW_RANKS[-1]}"
        raise UserError(f"--low-rank {rank}", expected, "use --low-rank 32")
