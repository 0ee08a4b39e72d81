"""Options of an export."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from export.lora.merge import LoraChoice
from wan22.precision import Number, Precision


@dataclass(frozen=True)
class ExportOptions:
    # precision
    precision: Precision = Precision.FP32
    precisions: Mapping[str, Precision] = field(default_factory=dict)  # keys: experts, text_encoder, vae_decoder
    fp8_attention: Literal["both", "self", "cross"] | None = None  # what fp8-attn computes in FP8; None: both
    keep_high_precision: frozenset[int] = frozenset()  # transformer blocks in 16 bits
    exceptions: Mapping[str, Number] = field(default_factory=dict)  # linears, as in Quantised, → another number type
    by_crest: Number | None = None  # the type of linears whose inputs have too large a crest for INT8; None: INT8
    input_scales: Path | None = None  # static FP8 scales of activations; linears without one are scaled per token
    input_means: Path | None = None  # means and factors of inputs; None: measured without data
    low_rank: int = 0  # of a 16-bit branch beside every NVFP4 matrix; 0: none
    # shapes
    size: tuple[int, int] | None = None  # width, height in pixels; with frames: fixed shapes
    frames: int | None = None
    # sampling
    preset: str | None = None  # a name in wan22.sampling.PRESETS, stored as the bundle's default
    # LoRAs, added to the experts in this order
    loras: tuple[LoraChoice, ...] = ()
    lora_ignore_unmatched: bool = False
    # writing
    parts: frozenset[str] = frozenset()  # experts, text_encoder, vae_encoder, vae_decoder; empty: all
    link: bool = False  # share the checkpoint's files where they store tensors in the graphs' dtype and shape
    overwrite: bool = False
    sparse: bool = False  # the checkpoint, hence the bundle, consists of holes (``synth --sparse``): no disk check
    command: str = field(default="export.export_checkpoint(...)", compare=False)  # recorded in the manifest
