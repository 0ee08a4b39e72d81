"""What an export can be asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from export.lora.merge import LoraChoice
from wan22.specs import Precision


@dataclass(frozen=True)
class ExportOptions:
    # precision
    precision: Precision = Precision.FP32
    precisions: Mapping[str, Precision] = field(default_factory=dict)  # of single parts: experts, text encoder, decoder
    fp8_attention: Literal["both", "self", "cross"] = "both"  # which attention fp8-attn computes in FP8
    keep_high_precision: frozenset[int] = frozenset()  # transformer blocks without FP8
    input_scales: Path | None = None  # static FP8 scales of activations; dynamic per token where there are none
    input_means: Path | None = None  # what FP8 linears subtract from their inputs before they scale them per token
    # shapes
    size: tuple[int, int] | None = None  # width, height in pixels; with frames: fixed shapes
    frames: int | None = None
    # sampling
    preset: str | None = None  # of wan22.sampling.PRESETS, which the bundle then samples with by default
    # LoRAs, added to the experts in this order
    loras: tuple[LoraChoice, ...] = ()
    lora_ignore_unmatched: bool = False
    # writing
    parts: frozenset[str] = frozenset()  # experts, text_encoder, vae_encoder, vae_decoder; all where empty
    link: bool = False  # tensors stored as the graphs want them stay in the checkpoint's files, shared with the bundle
    overwrite: bool = False
    sparse: bool = False  # the checkpoint is holes (``synth --sparse``), which take no disk in the result either
    command: str = field(default="export.export_checkpoint(...)", compare=False)  # recorded in the manifest
