"""Which precision each part of a model has, and what of a transformer is computed in FP8."""

from collections.abc import Mapping

from export.component import FP8_PRECISIONS
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.linear import Fp8
from export.options import ExportOptions
from wan22.errors import UserError
from wan22.specs import ModelSpec, Precision

COMPUTE = {  # what is not FP8
    Precision.FP32: FLOAT,
    Precision.BF16: BFLOAT16,
    Precision.FP16: FLOAT16,
    Precision.FP8: BFLOAT16,
    Precision.FP8_ATTN: BFLOAT16,
}
TEXT_ENCODER_IN_FP8 = ("text_encoder", Precision.FP8)  # its feed-forward, when asked for
WHY_HIGHER = {
    "text_encoder": "runs twice per video; FP8 saves memory only",
    "vae_encoder": "bfloat16 shifts the image condition",
    "vae_decoder": "0.1 % of the work of a run; 16 bits shift colours",
}


def precisions_of(spec: ModelSpec, options: ExportOptions) -> dict[str, Precision]:
    """Of every part. What is not said follows ``options.precision`` as far as it is good for the part."""
    asked = options.precision
    sixteen = Precision.BF16 if asked in FP8_PRECISIONS else asked
    usual = dict.fromkeys(spec.experts, asked)
    usual |= {"text_encoder": sixteen, "vae_encoder": Precision.FP32, "vae_decoder": Precision.FP32}
    for part, precision in options.precisions.items():
        if part not in usual or part == "vae_encoder":
            known = ", ".join(p for p in usual if p != "vae_encoder")
            raise UserError(f"a precision for {part!r}", f"one of {known}", "leave it out")
        if part not in spec.experts and precision in FP8_PRECISIONS and (part, precision) != TEXT_ENCODER_IN_FP8:
            fp8_too = ", fp8 for its feed-forward" if part == TEXT_ENCODER_IN_FP8[0] else ""
            raise UserError(f"{part} in {precision}", f"fp32, bf16, fp16{fp8_too}", "choose one of them")
    return {**usual, **options.precisions}


def fp8_of(
    precision: Precision, options: ExportOptions, static: Mapping[str, float], centred: Mapping[str, int]
) -> Fp8 | None:
    """What of an expert is computed in FP8; linears with a static scale, and with a mean and its length."""
    if precision not in FP8_PRECISIONS:
        return None
    in_fp8 = {options.fp8_attention} if precision == Precision.FP8_ATTN else set()
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
    chosen = {precisions[expert] for expert in spec.experts}
    if beyond := [block for block in sorted(options.keep_high_precision) if block >= spec.dit.layers]:
        expected = f"blocks 0 to {spec.dit.layers - 1} of {spec.name}"
        raise UserError(f"--keep-high-precision {beyond[0]}", expected, "name others")
    for option, given in {
        "--keep-high-precision": options.keep_high_precision,
        "--input-scales": options.input_scales,
        "--input-means": options.input_means,
    }.items():
        if given and not chosen & set(FP8_PRECISIONS):
            raise UserError(f"{option} without FP8", "a transformer in fp8 or fp8-attn", f"leave {option} out")
    if options.fp8_attention != "both" and Precision.FP8_ATTN not in chosen:
        raise UserError(
            f"--fp8-attention {options.fp8_attention} without FP8 attention", "fp8-attn", "use --precision fp8-attn"
        )


def why_higher(part: str, precision: Precision, options: ExportOptions) -> str:
    """Why ``part``, or something in it, is above the precision that was asked for."""
    if part in WHY_HIGHER:
        return WHY_HIGHER[part] if precision != options.precision else ""
    told = []
    if precision in FP8_PRECISIONS and options.keep_high_precision:
        told.append(f"asked for: no FP8 in blocks {', '.join(map(str, sorted(options.keep_high_precision)))}")
    if precision == Precision.FP8_ATTN and options.fp8_attention != "both":
        told.append(f"asked for: only {options.fp8_attention}-attention in FP8")
    return "; ".join(told)
