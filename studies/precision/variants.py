"""The precisions of the study, each computed on the CPU from the graph that an export in it writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from engines.cpu.emulation import MOVING, emulate
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8_MAX, Quantised, coded_matrices, kind_of
from export.graphs.taps import Tapped, add_taps, linear_inputs
from export.precisions import LINEARS, usual_exceptions
from export.quantise.input_scales import MARGIN
from export.quantise.inputs import CENTRED, MeasuredInput, column_maxima, input_width, smoothing_factors
from export.quantise.quantised_weights import QuantisedWeights
from runtime.arrays import F32
from studies.precision.ablation import Patch, keep_k_mean, scale_v_per_tensor, subtract_token_means
from studies.precision.session import fill, open_graph
from validate.ladder.thresholds import BF16, FP16
from wan22.parts import DitSpec
from wan22.precision import Number, Precision

PLAIN = "float32, ONNX Runtime's own kernels"
ROUNDED = "the exported graph in float32, rounded to {} wherever it keeps 16 bits; sums in float32"
QUANTISED = "the exported graph; codes exactly, sums in float32, bfloat16 by rounding as in bf16"
BEFOREHAND = "measured on a run with another prompt and other noise"
WITHOUT_DATA = "measured by the export: noise, no text, few tokens"
WITHIN = "subtracts from every linear's input its mean over the tokens of the call; the rounded weights restore it"
LESS = {"K not smoothed": keep_k_mean, "V per tensor": scale_v_per_tensor}  # attention without one of its precautions
FP8, INT8 = Quantised(), Quantised(linears=Number.INT8)
NVFP4 = Quantised(linears=Number.NVFP4)
NVFP4_RANK_32 = replace(NVFP4, low_rank=32)
NVFP4_FFN = Quantised(linears=Number.NVFP4, exceptions=usual_exceptions(Precision.NVFP4_FFN))
FP8_ATTN, INT8_FP8_ATTN = Quantised(True, True), Quantised(True, True, Number.INT8)

Source = Literal["", "export", "run"]  # of means and factors: none, the export's measurement, a run beforehand


@dataclass(frozen=True)
class Variant:
    """One row of the study. A row with a ``precision`` is what an export in it makes."""

    name: str
    compute: ir.DataType
    how: str
    aim: float = 0.0  # relative L2 error of a velocity; 0: no aim
    quantised: Quantised | None = None  # without what is measured
    inputs: Source = ""
    smoothed: bool = True  # uses factors where an export does
    static: bool = False  # uses input scales measured beforehand
    patch: Patch | None = None  # applied to the exported graph
    note: str = ""
    precision: Precision | None = None

    @property
    def ablation(self) -> bool:
        """True if no export makes this variant."""
        unmeasured = self.quantised is not None and not (self.inputs or self.static)
        return self.patch is not None or unmeasured or not self.smoothed


def _exported(precision: Precision, quantised: Quantised, aim: float) -> tuple[Variant, ...]:
    """What an export makes, and the same with means and factors of ``wan-trt calibrate``."""
    made = Variant(
        str(precision), BFLOAT16, QUANTISED, aim, quantised, "export", note=WITHOUT_DATA, precision=precision
    )
    return made, replace(made, name=f"{precision}, calibrated", inputs="run", note=BEFOREHAND, precision=None)


REFERENCE = Variant("fp32", FLOAT, PLAIN)
BFLOAT = Variant("bf16", BFLOAT16, ROUNDED.format("bfloat16"), BF16.velocity.value, precision=Precision.BF16)
VARIANTS = (
    BFLOAT,
    Variant("fp16", FLOAT16, ROUNDED.format("float16"), FP16.velocity.value, precision=Precision.FP16),
    *_exported(Precision.FP8, FP8, 0.02),
    Variant("fp8 without means", BFLOAT16, QUANTISED, 0.0, FP8),
    Variant("fp8, token means at run time", BFLOAT16, QUANTISED, 0.0, FP8, patch=subtract_token_means, note=WITHIN),
    Variant("fp8, static scales", BFLOAT16, QUANTISED, 0.02, FP8, static=True, note=f"{BEFOREHAND}, 10 % margin"),
    *_exported(Precision.FP8_ATTN, FP8_ATTN, 0.04),
    *(Variant(f"fp8-attn, {less}", BFLOAT16, QUANTISED, 0.0, FP8_ATTN, "export", patch=LESS[less]) for less in LESS),
    *_exported(Precision.INT8, INT8, 0.01),
    Variant("int8 without factors", BFLOAT16, QUANTISED, 0.0, INT8, "export", smoothed=False),
    Variant("int8 without means and factors", BFLOAT16, QUANTISED, 0.0, INT8),
    *_exported(Precision.INT8_FP8_ATTN, INT8_FP8_ATTN, 0.02),
    *_exported(Precision.NVFP4, NVFP4, 0.045),
    Variant("nvfp4, rank 32", BFLOAT16, QUANTISED, 0.045, NVFP4_RANK_32, "export", note=WITHOUT_DATA),
    Variant("nvfp4, rank 32, calibrated", BFLOAT16, QUANTISED, 0.045, NVFP4_RANK_32, "run", note=BEFOREHAND),
    Variant("nvfp4 without factors", BFLOAT16, QUANTISED, 0.0, NVFP4, "export", smoothed=False),
    Variant("nvfp4, nearest codes of plain inputs", BFLOAT16, QUANTISED, 0.0, NVFP4),
    *_exported(Precision.NVFP4_FFN, NVFP4_FFN, 0.04),
)


def parts(linears: Sequence[str] = LINEARS) -> list[Variant]:
    """Variants with lower precision in a single place, which show the error of each place."""
    alone: list[tuple[str, Quantised, Patch | None]] = []
    for number in (Number.FP8, Number.INT8, Number.NVFP4):
        for linear in linears:
            others = {other: Number.BF16 for other in LINEARS if other != linear}
            alone.append((f"{number} in {linear}", Quantised(linears=number, exceptions=others), None))
    nowhere = dict.fromkeys(LINEARS, Number.BF16)
    for name, fp8 in {"self-attention": Quantised(True), "cross-attention": Quantised(False, True)}.items():
        made = replace(fp8, exceptions=nowhere)
        alone += [
            (f"fp8 in {name}", made, None),
            *((f"fp8 in {name}, {less}", made, patch) for less, patch in LESS.items()),
        ]
    return [Variant(name, BFLOAT16, QUANTISED, 0.0, made, "export", patch=patch) for name, made, patch in alone]


@dataclass(frozen=True)
class Calibration:
    """The inputs of an expert's linears, measured before the judged run: by an export, and by a run."""

    largest: Mapping[str, float]
    by_run: Mapping[str, MeasuredInput]
    by_export: Mapping[str, MeasuredInput]
    by_export_in_fp4: Mapping[str, MeasuredInput]  # over more tokens


NO_CALIBRATION = Calibration({}, {}, {}, {})


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
    """The float32 graph, recording of every linear's input the largest magnitude and what an export uses."""
    model = _model(REFERENCE, spec, weights, NO_CALIBRATION)
    entering = linear_inputs(model)
    rows = {name: (x, input_width(spec, name)) for name, x in entering.items() if kind_of(name) in CENTRED}
    taps = add_taps(model, entering, rows)
    return Tapped(open_graph(model), taps)


def inputs_of(
    tapped: Tapped, weights: Mapping[str, F32], rows: Mapping[str, MeasuredInput]
) -> dict[str, MeasuredInput]:
    """Means and factors from the calls of a tapped graph; ``rows`` from parts of them."""
    spreads = tapped.spreads
    vectors = {
        name: MeasuredInput(mean, smoothing_factors(spreads[name], column_maxima(weights.__getitem__, name)))
        for name, mean in tapped.means.items()
    }
    return {name: replace(vectors.get(name, found), rows=found.rows) for name, found in rows.items()}


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
    made = variant.quantised
    if made is None:
        return fill(dit_graph(spec, variant.compute), weights.__getitem__)
    scales = {name: MARGIN * value / FLOAT8_MAX for name, value in measured.largest.items()} if variant.static else {}
    by_export = measured.by_export_in_fp4 if made.linears is Number.NVFP4 else measured.by_export
    known = {"": {}, "export": by_export, "run": measured.by_run}[variant.inputs]
    used = {linear: found for linear, found in known.items() if made.number(linear) is not None}
    smooth = {
        name
        for name, found in used.items()
        if variant.smoothed and found.factor is not None and (number := made.number(name)) and number.smoothed
    }
    used = {name: found if name in smooth else replace(found, factor=None) for name, found in used.items()}
    centred, smoothed = frozenset(map(kind_of, used)) & set(CENTRED), frozenset(map(kind_of, smooth))
    made = replace(made, static=frozenset(scales), centred=centred, smoothed=smoothed)
    g = dit_graph(spec, variant.compute, None, made)
    if variant.patch:
        variant.patch(g)
    made_weights = QuantisedWeights(weights.__getitem__, spec, coded_matrices(g), scales, used, made.low_rank)
    return fill(g, made_weights)
