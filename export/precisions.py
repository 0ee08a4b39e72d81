"""Which precision each part of a model has, and what of a transformer is computed in FP8."""

from collections.abc import Mapping

import onnx_ir as ir

from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.linear import Fp8
from export.options import ExportOptions
from wan22.errors import UserError
from wan22.specs import ModelSpec, Number, Precision

IN_GRAPHS = {Number.FP32: FLOAT, Number.BF16: BFLOAT16, Number.FP16: FLOAT16}
WHY_HIGHER = {
    "text_encoder": "runs twice per video; FP8 saves memory only",
    "vae_encoder": "bfloat16 shifts the image condition",
    "vae_decoder": "0.1 % of the work of a run; 16 bits shift colours",
}


def compute_type(precision: Precision) -> ir.DataType:
    """The type that a graph computes in what it does not quantise."""
    return IN_GRAPHS[precision.wide.linears]


def precisions_of(spec: ModelSpec, options: ExportOptions) -> dict[str, Precision]:
    """Of every part. What is not said follows ``options.precision`` as far as it is good for the part."""
    asked = options.precision
    usual = dict.fromkeys(spec.experts, asked)
    usual |= {"text_encoder": asked.wide, "vae_encoder": Precision.FP32, "vae_decoder": Precision.FP32}
    for part, precision in options.precisions.items():
        if part not in usual or part == "vae_encoder":
            known = ", ".join(p for p in usual if p != "vae_encoder")
            raise UserError(f"a precision for {part!r}", f"one of {known}", "leave it out")
        if part not in spec.experts and precision not in (possible := _possible(part)):
            feed_forward = " for its feed-forward" if possible[-1].quantised else ""
            raise UserError(f"{part} in {precision}", f"{', '.join(possible)}{feed_forward}", "choose one of them")
    return {**usual, **options.precisions}


def _possible(part: str) -> tuple[Precision, ...]:
    """The precisions of a part other than an expert; the feed-forward of the text encoder can be in FP8."""
    quantised = [p for p in Precision if p.linears is Number.FP8 and p.attention.bits == 16]
    return (*(p for p in Precision if not p.quantised), *(quantised if part == "text_encoder" else ()))


def fp8_of(
    precision: Precision, options: ExportOptions, static: Mapping[str, float], centred: Mapping[str, int]
) -> Fp8 | None:
    """What of an expert is computed in FP8; linears with a static scale, and with a mean and its length."""
    if precision.linears is not Number.FP8:
        return None
    in_fp8 = {options.fp8_attention} if precision.attention is Number.FP8 else set()
    return Fp8(
        self_attention=bool(in_fp8 & {"both", "self"}),
        cross_attention=bool(in_fp8 & {"both", "cross"}),
        high_precision_blocks=options.keep_high_precision,
        static=frozenset(static),
        centred=centred,
    )


def check_fp8(spec: ModelSpec, options: ExportOptions) -> None:
    """Refuses what says how FP8 is to be done where none is, and blocks that are not there."""
    precisions = precisions_of(spec, options)
    linears = {precisions[expert].linears for expert in spec.experts}
    attention = {precisions[expert].attention for expert in spec.experts}
    if beyond := [block for block in sorted(options.keep_high_precision) if block >= spec.dit.layers]:
        expected = f"blocks 0 to {spec.dit.layers - 1} of {spec.name}"
        raise UserError(f"--keep-high-precision {beyond[0]}", expected, "name others")
    for option, given in {
        "--keep-high-precision": options.keep_high_precision,
        "--input-scales": options.input_scales,
        "--input-means": options.input_means,
    }.items():
        if given and Number.FP8 not in linears:
            raise UserError(f"{option} without FP8", "a transformer in fp8 or fp8-attn", f"leave {option} out")
    if options.fp8_attention != "both" and Number.FP8 not in attention:
        raise UserError(
            f"--fp8-attention {options.fp8_attention} without FP8 attention", "fp8-attn", "use --precision fp8-attn"
        )


def why_higher(part: str, precision: Precision, options: ExportOptions) -> str:
    """Why ``part``, or something in it, is above the precision that was asked for."""
    if part in WHY_HIGHER:
        return WHY_HIGHER[part] if precision != options.precision else ""
    told = []
    if precision.quantised and options.keep_high_precision:
        told.append(f"asked for: no FP8 in blocks {', '.join(map(str, sorted(options.keep_high_precision)))}")
    if precision.attention is Number.FP8 and options.fp8_attention != "both":
        told.append(f"asked for: only {options.fp8_attention}-attention in FP8")
    return "; ".join(told)
