"""The precision of each part of a model, and the layers of a transformer that are quantised."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.linear import CODES, Quantised, kind_of
from export.options import ExportOptions
from export.quantise.inputs import CENTRED, MeasuredInput
from wan22.errors import UserError
from wan22.precision import Number, Precision, check_low_rank
from wan22.specs import ModelSpec

IN_GRAPHS = {Number.FP32: FLOAT, Number.BF16: BFLOAT16, Number.FP16: FLOAT16}
LINEARS = (*CENTRED, "cross_attn.k")  # kinds; self_attn.q stands for q, k and v, cross_attn.k for k and v
ALIGNED = 16  # of rows in quantised matrix products
WHY_HIGHER = {
    "text_encoder": "runs twice per video; 8 bits save memory only",
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


def quantised_of(
    precision: Precision,
    options: ExportOptions,
    exceptions: Mapping[str, Number],
    static: Mapping[str, float],
    inputs: Mapping[str, MeasuredInput],
) -> Quantised | None:
    """What the blocks of an expert multiply in less than 16 bits; None if nothing.

    INT8 and NVFP4 need factors, which even out their rows. FP8 gains nothing by them, and keeps stored codes without.

    Args:
        precision: the expert's precision.
        options: the export's options.
        exceptions: linears of another type than the precision's.
        static: linears with a static input scale.
        inputs: measurements on the inputs of linears.
    """
    if not precision.quantised:
        return None
    in_fp8 = {options.fp8_attention or "both"} if precision.attention is Number.FP8 else set()
    exceptions = {**usual_exceptions(precision), **exceptions}
    made = Quantised(
        self_attention=bool(in_fp8 & {"both", "self"}),
        cross_attention=bool(in_fp8 & {"both", "cross"}),
        linears=precision.linears,
        exceptions=exceptions,
        high_precision_blocks=options.keep_high_precision,
        low_rank=options.low_rank if precision.linears is Number.NVFP4 else 0,
    )
    numbers = {linear: made.number(linear) for linear in (*static, *inputs)}
    return replace(
        made,
        static=frozenset(linear for linear in static if (n := numbers[linear]) in CODES and CODES[n].takes_scales),
        centred=frozenset(kind_of(linear) for linear in inputs if numbers[linear] is not None) & set(CENTRED),
        smoothed=frozenset(
            kind_of(linear)
            for linear, found in inputs.items()
            if (n := numbers[linear]) and n.smoothed and found.factor is not None
        ),
    )


def usual_exceptions(precision: Precision) -> dict[str, Number]:
    """The linears outside the feed-forward, if ``precision`` has another type for them."""
    beside = precision.beside_feed_forward
    outside = [kind for kind in LINEARS if not kind.startswith("ffn.")]
    return dict.fromkeys(outside, beside) if beside is not precision.linears else {}


def usual_quantised(precision: Precision) -> Quantised | None:
    """What an export without further options makes, which measures the inputs of all linears."""
    nothing = np.zeros(0, np.float32)
    inputs = {f"blocks.0.{kind}": MeasuredInput(nothing, nothing) for kind in CENTRED}
    return quantised_of(precision, ExportOptions(precision), {}, {}, inputs)


def used_inputs(quantised: Quantised | None, inputs: Mapping[str, MeasuredInput]) -> dict[str, MeasuredInput]:
    """What the graph of ``quantised`` uses of ``inputs``."""
    if quantised is None:
        return {}
    used = {linear: x for linear, x in inputs.items() if quantised.number(linear) and linear not in quantised.static}
    return {
        linear: found if kind_of(linear) in quantised.smoothed else replace(found, factor=None)
        for linear, found in used.items()
    }


def check_quantised(spec: ModelSpec, options: ExportOptions) -> None:
    """Raise UserError for options of quantised linears without any, and for blocks and linears that do not exist."""
    precisions = precisions_of(spec, options)
    linears = {precisions[expert].linears for expert in spec.experts}
    quantised = any(number.bits < 16 for number in linears)
    if beyond := [block for block in sorted(options.keep_high_precision) if block >= spec.dit.layers]:
        expected = f"blocks 0 to {spec.dit.layers - 1} of {spec.name}"
        raise UserError(f"--keep-high-precision {beyond[0]}", expected, "name existing blocks")
    for linear, number in options.exceptions.items():
        block, _, kind = (
            linear.removeprefix("blocks.").partition(".") if linear.startswith("blocks.") else ("0", "", linear)
        )
        if kind not in LINEARS or not block.isdigit() or int(block) >= spec.dit.layers:
            expected = f"one of {', '.join(LINEARS)}, or the same of a block, as blocks.0.ffn.2"
            raise UserError(f"--keep-high-precision {linear}", expected, "name existing linears")
        if number.bits >= 16 and number is not Number.BF16:
            raise UserError(f"--keep-high-precision {linear}={number}", "bf16, fp8 or int8", "choose one of these")
        if number is Number.NVFP4:
            raise UserError(f"--keep-high-precision {linear}={number}", "bf16, fp8 or int8", "use --precision nvfp4")
    for option, given in {
        "--keep-high-precision": options.keep_high_precision or options.exceptions or options.by_crest,
        "--input-means": options.input_means,
    }.items():
        if given and not quantised:
            raise UserError(
                f"{option} without 8 or 4 bits", "a transformer in fp8, int8 or nvfp4", f"leave {option} out"
            )
    check_low_rank(options.low_rank, linears)
    if options.input_scales and Number.FP8 not in linears:
        raise UserError("--input-scales without FP8", "a transformer in fp8 or fp8-attn", "leave --input-scales out")
    if options.fp8_attention and all(precisions[expert].attention is not Number.FP8 for expert in spec.experts):
        each = ", ".join(f"{expert} in {precisions[expert]}" for expert in spec.experts)
        found = f"--fp8-attention {options.fp8_attention} without FP8 attention: {each}"
        raise UserError(found, "a transformer in fp8-attn or int8+fp8-attn", "leave it out or choose one of these")
    if quantised and (odd := [size for size in (spec.dit.width, spec.dit.ffn_width) if size % ALIGNED]):
        number, dit = min(linears, key=lambda number: number.bits), spec.dit
        told = f"{number} for a transformer of width {dit.width} and feed-forward {dit.ffn_width}"
        raise UserError(told, f"multiples of {ALIGNED}, not {odd[0]}", "use --precision bf16")


def why_higher(part: str, precision: Precision, options: ExportOptions, exceptions: Mapping[str, Number]) -> str:
    """Why ``part``, or some of its layers, has a higher precision than requested; "" if it does not."""
    if part in WHY_HIGHER:
        return WHY_HIGHER[part] if precision != options.precision else ""
    reasons = []
    if precision.quantised and options.keep_high_precision:
        blocks = ", ".join(map(str, sorted(options.keep_high_precision)))
        reasons.append(f"requested: 16 bits in blocks {blocks}")
    if kept := [linear for linear, number in exceptions.items() if number.significand > precision.linears.significand]:
        reasons.append(f"kept: {', '.join(f'{linear} in {exceptions[linear]}' for linear in sorted(kept))}")
    if precision.attention is Number.FP8 and options.fp8_attention in ("self", "cross"):
        reasons.append(f"requested: only {options.fp8_attention}-attention in FP8")
    return "; ".join(reasons)
