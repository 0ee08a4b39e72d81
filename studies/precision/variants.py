"""The precisions that a study compares, each computed on a CPU from the graph that an export of it writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from engines.cpu.emulation import MOVING, emulate
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8, FLOAT8_MAX, Fp8
from export.graphs.taps import Tapped, add_taps, linear_inputs
from export.quantise.fp8_weights import Fp8Weights
from export.quantise.input_means import CENTRED, input_width
from runtime.arrays import F32
from studies.precision.session import filled, opened
from validate.calibrate import MARGIN
from validate.ladder.thresholds import BF16, FP16
from wan22.parts import DitSpec

PLAIN = "float32, ONNX Runtime's own kernels"
ROUNDED = "the exported graph in float32, rounded to {} wherever it keeps 16 bits; sums in float32"
QUANTISED = "the exported graph; FP8 quantised exactly, sums in float32, bfloat16 by rounding as in bf16"
BEFOREHAND = "measured on a run with another prompt and other noise"
WITHIN = "every linear's input loses its mean over the tokens of the call; the rounded weights bring it back"
UNTOLD = "measured on a run without text over few tokens: no data"
BOTH = Fp8(self_attention=True, cross_attention=True)

# Linears by the name under which the graph multiplies them (q is q, k and v; k of cross-attention is k and v).
LINEARS = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True)
class Variant:
    name: str
    compute: ir.DataType
    how: str
    aim: float = 0.0  # relative L2 error of a velocity; 0 where there is none
    fp8: Fp8 | None = None
    static: bool = False  # with input scales measured beforehand
    centred: bool = False  # with input means measured beforehand
    untold: bool = False  # those of a small run without text
    ablation: bool = False  # no export makes it
    note: str = ""


REFERENCE = Variant("fp32", FLOAT, PLAIN)
BFLOAT = Variant("bf16", BFLOAT16, ROUNDED.format("bfloat16"), BF16.velocity.value)  # whose magnitudes are shown
VARIANTS = (
    BFLOAT,
    Variant("fp16", FLOAT16, ROUNDED.format("float16"), FP16.velocity.value),
    Variant("fp8", BFLOAT16, QUANTISED, 0.02, Fp8(), note="every token scaled by itself"),
    Variant("fp8 with input means", BFLOAT16, QUANTISED, 0.02, Fp8(), centred=True, note=BEFOREHAND),
    Variant("fp8, means without text", BFLOAT16, QUANTISED, 0.02, Fp8(), centred=True, untold=True, note=UNTOLD),
    Variant(
        "fp8, token means at run time", BFLOAT16, QUANTISED, 0.02, Fp8(token_means=True), ablation=True, note=WITHIN
    ),
    Variant("fp8 with static scales", BFLOAT16, QUANTISED, 0.02, Fp8(), static=True, note=f"{BEFOREHAND}, 10 % margin"),
    Variant("fp8-attn", BFLOAT16, QUANTISED, 0.04, BOTH),
    Variant("fp8-attn with input means", BFLOAT16, QUANTISED, 0.04, BOTH, centred=True, note=BEFOREHAND),
    Variant("fp8-attn, K not smoothed", BFLOAT16, QUANTISED, 0.04, replace(BOTH, smooth_k=False), ablation=True),
    Variant("fp8-attn, V per tensor", BFLOAT16, QUANTISED, 0.04, replace(BOTH, v_per_channel=False), ablation=True),
)


def parts() -> list[Variant]:
    """Variants with FP8 in one place alone, which show what each place costs."""
    only = [
        Variant(linear, BFLOAT16, QUANTISED, fp8=Fp8(high_precision_linears=frozenset(LINEARS) - {linear}))
        for linear in LINEARS
    ]
    every = frozenset(LINEARS)
    attentions = {"self-attention": Fp8(self_attention=True), "cross-attention": Fp8(cross_attention=True)}
    return only + [
        Variant(
            f"{name}{less}", BFLOAT16, QUANTISED, fp8=replace(how, high_precision_linears=every), ablation=bool(less)
        )
        for name, fp8 in attentions.items()
        for less, how in _less_and_less(fp8)
    ]


def _less_and_less(fp8: Fp8) -> list[tuple[str, Fp8]]:
    """Attention as it is exported, and without its precautions."""
    return [
        ("", fp8),
        (", K not smoothed", replace(fp8, smooth_k=False)),
        (", V per tensor", replace(fp8, v_per_channel=False)),
    ]


@dataclass(frozen=True)
class Measured:
    """What was found to enter the linears of an expert, before the run that is judged."""

    largest: Mapping[str, float]
    means: Mapping[str, F32]


NOTHING = Measured({}, {})


def open_variant(
    variant: Variant, spec: DitSpec, weights: Mapping[str, F32], measured: Measured
) -> Callable[..., np.ndarray]:
    """The velocity as a function."""
    model = _model(variant, spec, weights, measured)
    if variant.compute != FLOAT:
        emulate(model, variant.compute)
    graph = opened(model)
    return lambda **inputs: graph(**inputs)[0]


def open_reference(spec: DitSpec, weights: Mapping[str, F32]) -> Tapped:
    """The float32 graph, noting what enters every linear: the largest of it, and the means that an export takes."""
    model = _model(REFERENCE, spec, weights, NOTHING)
    entering = linear_inputs(model)
    centred = {name: (x, input_width(spec, name)) for name, x in entering.items() if name.split(".", 2)[2] in CENTRED}
    taps = add_taps(model, entering, centred)
    return Tapped(opened(model), taps)


def open_noted(variant: Variant, spec: DitSpec, weights: Mapping[str, F32]) -> Tapped:
    """A 16-bit variant, noting the largest of what each block keeps in 16 bits, and of the residual stream after it.

    Labels: "3/ffn/Gelu" (block, node), "3/residual".
    """
    model = _model(variant, spec, weights, NOTHING)
    tapped: dict[str, ir.Value] = {}
    for node in model.graph:
        block, _, place = (node.name or "").removeprefix("blocks.").partition("/")
        if place and block.isdigit():
            if node.outputs[0].dtype == variant.compute and node.op_type not in MOVING:
                tapped[f"{block}/{place}"] = node.outputs[0]
            tapped[f"{block}/residual"] = node.outputs[0]  # the block's last node
    taps = add_taps(model, tapped)
    emulate(model, variant.compute)
    return Tapped(opened(model), taps)


def _model(variant: Variant, spec: DitSpec, weights: Mapping[str, F32], measured: Measured) -> ir.Model:
    if variant.fp8 is None:
        return filled(dit_graph(spec, variant.compute), weights.__getitem__)
    scales = {name: MARGIN * value / FLOAT8_MAX for name, value in measured.largest.items()} if variant.static else {}
    means = measured.means if variant.centred else {}
    lengths = {name: len(mean) for name, mean in means.items()}
    g = dit_graph(spec, variant.compute, None, replace(variant.fp8, static=frozenset(scales), centred=lengths))
    quantised = [key for key, value in g.weights.items() if value.dtype == FLOAT8]
    return filled(g, Fp8Weights(weights.__getitem__, spec, quantised, scales, means))
