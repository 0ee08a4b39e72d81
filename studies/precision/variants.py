"""The precisions of the study, each computed on the CPU from the graph that an export in it writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from engines.cpu.emulation import MOVING, emulate
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8, FLOAT8_MAX, Quantised
from export.graphs.taps import Tapped, add_taps, linear_inputs
from export.quantise.input_means import CENTRED, input_width
from export.quantise.input_scales import MARGIN
from export.quantise.quantised_weights import QuantisedWeights
from runtime.arrays import F32
from studies.precision.ablation import FewLinears, Patch, keep_k_mean, scale_v_per_tensor, subtract_token_means
from studies.precision.session import fill, open_graph
from validate.ladder.thresholds import BF16, FP16
from wan22.parts import DitSpec

PLAIN = "float32, ONNX Runtime's own kernels"
ROUNDED = "the exported graph in float32, rounded to {} wherever it keeps 16 bits; sums in float32"
QUANTISED = "the exported graph; FP8 quantised exactly, sums in float32, bfloat16 by rounding as in bf16"
BEFOREHAND = "measured on a run with another prompt and other noise"
WITHIN = "subtracts from every linear's input its mean over the tokens of the call; the rounded weights restore it"
WITHOUT_TEXT = "measured on a run without text and with few tokens, so without data"
BOTH = Quantised(self_attention=True, cross_attention=True)
LESS = {"K not smoothed": keep_k_mean, "V per tensor": scale_v_per_tensor}  # attention without one of its precautions

# Linears by their names in the graph (self_attn.q stands for q, k and v; cross_attn.k for k and v).
LINEARS = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True)
class Variant:
    name: str
    compute: ir.DataType
    how: str
    aim: float = 0.0  # relative L2 error of a velocity; 0: no aim
    fp8: Quantised | None = None
    static: bool = False  # uses input scales measured beforehand
    centred: bool = False  # uses input means measured beforehand
    without_text: bool = False  # measures them on a small run without text
    patch: Patch | None = None  # applied to the exported graph
    note: str = ""

    @property
    def ablation(self) -> bool:
        """True if no export makes this variant."""
        return self.patch is not None


REFERENCE = Variant("fp32", FLOAT, PLAIN)
BFLOAT = Variant("bf16", BFLOAT16, ROUNDED.format("bfloat16"), BF16.velocity.value)  # the report shows its magnitudes
VARIANTS = (
    BFLOAT,
    Variant("fp16", FLOAT16, ROUNDED.format("float16"), FP16.velocity.value),
    Variant("fp8", BFLOAT16, QUANTISED, 0.02, Quantised(), note="one scale per token"),
    Variant("fp8 with input means", BFLOAT16, QUANTISED, 0.02, Quantised(), centred=True, note=BEFOREHAND),
    Variant(
        "fp8, means without text",
        BFLOAT16,
        QUANTISED,
        0.02,
        Quantised(),
        centred=True,
        without_text=True,
        note=WITHOUT_TEXT,
    ),
    Variant(
        "fp8, token means at run time", BFLOAT16, QUANTISED, 0.02, Quantised(), patch=subtract_token_means, note=WITHIN
    ),
    Variant(
        "fp8 with static scales", BFLOAT16, QUANTISED, 0.02, Quantised(), static=True, note=f"{BEFOREHAND}, 10 % margin"
    ),
    Variant("fp8-attn", BFLOAT16, QUANTISED, 0.04, BOTH),
    Variant("fp8-attn with input means", BFLOAT16, QUANTISED, 0.04, BOTH, centred=True, note=BEFOREHAND),
    *(Variant(f"fp8-attn, {less}", BFLOAT16, QUANTISED, 0.04, BOTH, patch=patch) for less, patch in LESS.items()),
)


def parts() -> list[Variant]:
    """Variants with FP8 in a single place, which show the error of each place."""
    alone: list[tuple[str, Quantised, Patch | None]]
    alone = [(linear, FewLinears(linears=frozenset({linear})), None) for linear in LINEARS]
    for name, fp8 in {"self-attention": FewLinears(True), "cross-attention": FewLinears(False, True)}.items():
        alone += [(name, fp8, None), *((f"{name}, {less}", fp8, patch) for less, patch in LESS.items())]
    return [Variant(name, BFLOAT16, QUANTISED, fp8=fp8, patch=patch) for name, fp8, patch in alone]


@dataclass(frozen=True)
class Calibration:
    """The inputs of an expert's linears, measured before the judged run: largest magnitude and mean, by linear."""

    largest: Mapping[str, float]
    means: Mapping[str, F32]


NO_CALIBRATION = Calibration({}, {})


def open_variant(
    variant: Variant, spec: DitSpec, weights: Mapping[str, F32], measured: Calibration
) -> Callable[..., np.ndarray]:
    """The variant as a function from inputs to the velocity."""
    model = _model(variant, spec, weights, measured)
    if variant.compute != FLOAT:
        emulate(model, variant.compute)
    graph = open_graph(model)
    return lambda **inputs: graph(**inputs)[0]


def open_reference(spec: DitSpec, weights: Mapping[str, F32]) -> Tapped:
    """The float32 graph, recording of every linear's input the largest magnitude and the means that an export uses."""
    model = _model(REFERENCE, spec, weights, NO_CALIBRATION)
    entering = linear_inputs(model)
    centred = {name: (x, input_width(spec, name)) for name, x in entering.items() if name.split(".", 2)[2] in CENTRED}
    taps = add_taps(model, entering, centred)
    return Tapped(open_graph(model), taps)


def open_noted(variant: Variant, spec: DitSpec, weights: Mapping[str, F32]) -> Tapped:
    """A 16-bit variant that records each block's largest magnitude in 16 bits, and that of the residual stream.

    Labels are "3/ffn/Gelu" (block, node) and "3/residual".
    """
    model = _model(variant, spec, weights, NO_CALIBRATION)
    tapped: dict[str, ir.Value] = {}
    for node in model.graph:
        block, _, place = (node.name or "").removeprefix("blocks.").partition("/")
        if place and block.isdigit():
            if node.outputs[0].dtype == variant.compute and node.op_type not in MOVING:
                tapped[f"{block}/{place}"] = node.outputs[0]
            tapped[f"{block}/residual"] = node.outputs[0]  # the block's last node
    taps = add_taps(model, tapped)
    emulate(model, variant.compute)
    return Tapped(open_graph(model), taps)


def _model(variant: Variant, spec: DitSpec, weights: Mapping[str, F32], measured: Calibration) -> ir.Model:
    if variant.fp8 is None:
        return fill(dit_graph(spec, variant.compute), weights.__getitem__)
    scales = {name: MARGIN * value / FLOAT8_MAX for name, value in measured.largest.items()} if variant.static else {}
    means = measured.means if variant.centred else {}
    lengths = {name: len(mean) for name, mean in means.items()}
    g = dit_graph(spec, variant.compute, None, replace(variant.fp8, static=frozenset(scales), centred=lengths))
    if variant.patch:
        variant.patch(g)
    quantised = [key for key, value in g.weights.items() if value.dtype == FLOAT8]
    return fill(g, QuantisedWeights(weights.__getitem__, spec, quantised, scales, means))
