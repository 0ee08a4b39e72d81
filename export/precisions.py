"""The precision of each part of a model, and the layers of a transformer that run in FP8."""

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
    """The type in which a graph computes everything it does not quantise."""
    return IN_GRAPHS[precision.wide.linears]


def precisions_of(spec: ModelSpec, options: ExportOptions) -> dict[str, Precision]:
    """The precision of every part. Parts without an explicit one follow ``options.precision`` where it suits them.

    Raises:
        UserError: an unknown part, or a precision the part does not support.
    """
    asked = options.precision
    usual = dict.fromkeys(spec.experts, asked)
    usual |= {"text_encoder": asked.wide, "vae_encoder": Precision.FP32, "vae_decoder": Precision.FP32}
    for part, precision in options.precisions.items():
        if part not in usual or part == "vae_encoder":
            known = ", ".join(p for p in usual if p != "vae_encoder")
            raise UserError(f"precision for unknown part {part!r}", f"one of {known}", "correct the name")
        possible = [p for p in Precision if not p.quantised]
        if part == "text_encoder":  # only its feed-forward runs in FP8
            possible += [p for p in Precision if p.linears is Number.FP8 and p.attention.bits == 16]
        if part not in spec.experts and precision not in possible:
            feed_forward = " for its feed-forward" if possible[-1].quantised else ""
            raise UserError(f"{part} in {precision}", f"{', '.join(possible)}{feed_forward}", "choose one of these")
    return {**usual, **options.precisions}


def fp8_of(
    precision: Precision,
    options: ExportOptions,
    static: Mapping[str, float],
    centred: Mapping[str, int],
    by_column: frozenset[str],
) -> Fp8 | None:
    """The FP8 settings of an expert; None if it does not use FP8.

    Args:
        precision: the expert's precision.
        options: the export's options.
        static: linears with a static input scale.
        centred: linears with an input mean → its length.
        by_column: kinds of matrices whose rows have different scales.
    """
    if precision.linears is not Number.FP8:
        return None
    in_fp8 = {options.fp8_attention} if precision.attention is Number.FP8 else set()
    return Fp8(
        self_attention=bool(in_fp8 & {"both", "self"}),
        cross_attention=bool(in_fp8 & {"both", "cross"}),
        high_precision_blocks=options.keep_high_precision,
        static=frozenset(static),
        centred=centred,
        by_column=by_column,
    )


def check_fp8(spec: ModelSpec, options: ExportOptions) -> None:
    """Raise UserError for FP8 options without FP8 and block numbers that do not exist."""
    precisions = precisions_of(spec, options)
    linears = {precisions[expert].linears for expert in spec.experts}
    attention = {precisions[expert].attention for expert in spec.experts}
    if beyond := [block for block in sorted(options.keep_high_precision) if block >= spec.dit.layers]:
        expected = f"blocks 0 to {spec.dit.layers - 1} of {spec.name}"
        raise UserError(f"--keep-high-precision {beyond[0]}", expected, "name existing blocks")
    for option, given in {
        "--keep-high-precision": options.keep_high_precision,
        "--input-scales": options.input_scales,
        "--input-means": options.input_means,
    }.items():
        if given and Number.FP8 not in linears:
            raise UserError(f"{option} without FP8", "a transformer in fp8 or fp8-attn", f"leave {option} out")
    if options.fp8_attention != "both" and Number.FP8 not in attention:
        found = f"--fp8-attention {options.fp8_attention} without FP8 attention"
        raise UserError(found, "fp8-attn", "use --precision fp8-attn")


def why_higher(part: str, precision: Precision, options: ExportOptions) -> str:
    """Why ``part``, or some of its layers, has a higher precision than requested; "" if it does not."""
    if part in WHY_HIGHER:
        return WHY_HIGHER[part] if precision != options.precision else ""
    reasons = []
    if precision.quantised and options.keep_high_precision:
        blocks = ", ".join(map(str, sorted(options.keep_high_precision)))
        reasons.append(f"requested: no FP8 in blocks {blocks}")
    if precision.attention is Number.FP8 and options.fp8_attention != "both":
        reasons.append(f"requested: only {options.fp8_attention}-attention in FP8")
    return "; ".join(reasons)
