"""Linears of the transformer in 16 or 32 bits, or in FP8 with one scale per token.

FP8 needs no calibration: each row of activations is divided by its largest magnitude and quantised with the constant
scale 1; the result is multiplied by the row's scale. Compilers fuse normalisation, modulation, maximum and quantisation
into one kernel, use an FP8 matrix multiplication, and fold scale and bias into the next kernel. They do not fuse a
per-tensor scale computed at run time, so only measured ones are supported (``static``). The same holds for the mean of
an input over its tokens: a measured mean (``centred``) costs no kernel; a mean computed at run time costs two or three
kernels per linear and memory for the centred rows, and gains little because it multiplies already rounded weights.

The consumer of a linear requests its float32 values, optionally of some columns or reshaped, and may do so twice: a
norm reads the 16-bit result once for its statistics and once to apply them, which keeps no float32 copy in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from export.graphs.builder import FLOAT, GraphBuilder

FLOAT8 = ir.DataType.FLOAT8E4M3FN
FLOAT8_MAX = 448.0
LARGEST_QUANTISED = 440.0  # below the maximum, so that rounding in the division cannot overflow
SMALLEST_ROW = 1e-6  # keeps the scale of an all-zero row positive


@dataclass(frozen=True)
class Fp8:
    """The layers of the transformer's blocks that run in FP8; embeddings, modulation, norms and head never do."""

    self_attention: bool = False
    cross_attention: bool = False
    high_precision_blocks: frozenset[int] = frozenset()  # blocks without any FP8
    static: frozenset[str] = frozenset()  # linears ("blocks.0.ffn.0") with a stored ``input_scale``
    centred: Mapping[str, int] = field(default_factory=dict)  # linears with a stored ``input_mean`` → its length
    by_column: frozenset[str] = frozenset()  # matrices ("self_attn.qkv") with a ``column_scale`` in every block

    @property
    def uniform(self) -> bool:
        """True if all blocks compute alike, so that one engine serves every block."""
        return not (self.high_precision_blocks or self.static or self.centred)

    def covers(self, key: str) -> bool:
        """True if ``key``, a linear or an attention ("blocks.3.ffn.2", "blocks.3.self_attn"), may run in FP8."""
        return key.startswith("blocks.") and int(key.split(".")[1]) not in self.high_precision_blocks


@dataclass(frozen=True)
class Operand:
    """The input of a linear: ``value [L, in]`` in the compute type; the true rows are ``value * scale``."""

    value: ir.Value
    scale: ir.Value | None = None  # float32 [L, 1]
    fp8: bool = False


@dataclass(frozen=True)
class Product:
    """The output of a linear: the true values are ``raw * factor * scale * columns + bias``, in float32."""

    raw: ir.Value  # [L, out], compute type
    scale: ir.Value | None = None  # float32 [L, 1]
    bias: ir.Value | None = None  # float32 [out]
    columns: ir.Value | None = None  # float32 [out], where the rows of the matrix have different scales
    factor: ir.Value | None = None  # float32 scalar, multiplies every value: the scale of a matrix that is an input


class Linears:
    """Write linears into ``g``. A key is an official name, ``parts`` the linears below it ("qkv": three linears)."""

    def __init__(self, g: GraphBuilder, compute: ir.DataType, fp8: Fp8 | None) -> None:
        self.g, self.compute, self.fp8 = g, compute, fp8
        self._quantised: dict[ir.Value, Operand] = {}

    def runs_fp8(self, key: str) -> bool:
        """True if the linear ``blocks.N. ...`` multiplies FP8 numbers."""
        return self.fp8 is not None and self.fp8.covers(key)

    # -- inputs

    def operand(self, x: ir.Value, key: str) -> Operand:
        """``x [L, in]`` as the input of the linear ``key``, quantised if it runs in FP8."""
        if not self.runs_fp8(key):
            return Operand(self.g.cast(x, self.compute))
        if self.fp8 and key in self.fp8.static:
            scale = self.g.weight(f"{key}.input_scale", (), FLOAT)
            return Operand(self.through_fp8(self.g.cast(x, FLOAT), scale), fp8=True)
        if self.fp8 and key in self.fp8.centred:
            mean = self.g.weight(f"{key}.input_mean", (self.fp8.centred[key],), FLOAT)
            return self.per_token(self.g.op("Sub", self.g.cast(x, FLOAT), mean))
        return self.per_token(x)

    def per_token(self, x: ir.Value) -> Operand:
        """``x [L, in]`` quantised with one scale per row; each ``x`` is quantised only once."""
        if x not in self._quantised:
            self._quantised[x] = self._per_token(self.g.cast(x, FLOAT))
        return self._quantised[x]

    def _per_token(self, x: ir.Value) -> Operand:
        rows, scale = self.quantise_rows(x)
        return self.quantised(rows, scale)

    def quantise_rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Float32 ``x [L, in]`` in FP8 with one scale per row, and the scales, float32 ``[L, 1]``."""
        g = self.g
        with g.scope("quantise"):
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([1]), keepdims=1)
            scale = g.op("Div", g.op("Max", largest, g.constant(SMALLEST_ROW, FLOAT)), _float(g, LARGEST_QUANTISED))
            return self.quantise(g.op("Div", x, scale), _float(g, 1.0)), scale

    def quantised(self, rows: ir.Value, scale: ir.Value) -> Operand:
        """The input of a linear from FP8 ``rows [L, in]`` and their ``scale [L, 1]``."""
        return Operand(self.dequantise(rows, _float(self.g, 1.0)), scale, fp8=True)

    def through_fp8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Quantise float32 ``x`` with a constant ``scale`` and dequantise it to the compute type."""
        return self.dequantise(self.quantise(x, scale), scale)

    def quantise(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Float32 ``x`` in FP8, divided by a constant ``scale``."""
        quantised = self.g.op("QuantizeLinear", x, scale, output_dtype=int(FLOAT8))
        quantised.type = ir.TensorType(FLOAT8)
        return quantised

    # -- the multiplication

    def __call__(self, x: Operand, key: str, parts: str, shape: tuple[int, int]) -> Product:
        """``x [L, in] → [L, len(parts) * out]``; ``shape`` is (in, out) of each of the ``parts`` of ``key``."""
        entering, leaving = shape
        with self.g.scope(parts):
            if x.fp8:
                return self._fp8_product(x, f"{key}.{parts}", (len(parts) * leaving, entering), key, parts)
            weight, bias = (
                self.g.joined([f"{key}.{part}.{leaf}" for part in parts], dims, self.compute)
                for leaf, dims in (("weight", (leaving, entering)), ("bias", (leaving,)))
            )
            return Product(self.g.op("Gemm", x.value, weight, bias, transB=1))

    def _fp8_product(self, x: Operand, name: str, shape: tuple[int, int], key: str, parts: str) -> Product:
        """The product with one stored matrix and scale for all ``parts``: graphs cannot concatenate FP8 constants."""
        g, each = self.g, shape[0] // len(parts)
        bias = g.joined([f"{key}.{part}.bias" for part in parts], (each,), FLOAT)
        by_column = self.fp8 is not None and name.split(".", 2)[2] in self.fp8.by_column
        columns = g.weight(f"{name}.column_scale", shape[:1], FLOAT) if by_column else None
        raw, factor = self.fp8_matmul(x, name, shape)
        return Product(raw, x.scale, bias, columns, factor)

    def fp8_matmul(self, x: Operand, name: str, shape: tuple[int, int]) -> tuple[ir.Value, ir.Value | None]:
        """``x [L, in]`` times the stored matrix ``name [out, in]``, transposed, in the compute type.

        And the scale of the matrix, if that is still to be multiplied: a scale of DequantizeLinear must be a constant.
        """
        g = self.g
        if g.weights_are_inputs:
            factor = g.weight(f"{name}.weight_scale", (), FLOAT)
            return self._times(x, g.weight(f"{name}.weight", shape, FLOAT8), _float(g, 1.0)), factor
        stored = g.weight(f"{name}.weight", shape, FLOAT8)
        return self._times(x, stored, g.weight(f"{name}.weight_scale", (), FLOAT)), None

    def _times(self, x: Operand, stored: ir.Value, scale: ir.Value) -> ir.Value:
        return self.g.op("MatMul", x.value, self.g.transpose(self.dequantise(stored, scale), 1, 0))

    def dequantise(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """``x`` in the compute type. The float32 scale avoids overflow and keeps the product's range."""
        value = self.g.op("DequantizeLinear", x, scale, output_dtype=int(self.compute))
        value.type = ir.TensorType(self.compute)
        return value

    # -- outputs

    def values(
        self, y: Product, columns: tuple[int, int] | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Float32 values of ``y [L, out]``, optionally only ``columns`` (first, end), rows reshaped to ``shape``."""
        g, raw = self.g, y.raw

        def by_column(vector: ir.Value) -> ir.Value:
            vector = g.slice(vector, 0, *columns) if columns else vector
            return g.reshape(vector, list(shape)) if shape else vector

        if columns:
            raw = g.slice(raw, 1, *columns)
        x = g.cast(g.reshape(raw, [-1, *shape]) if shape else raw, FLOAT)
        if y.factor is not None:
            x = g.mul(x, y.factor)
        if y.scale is not None:
            x = g.mul(x, g.reshape(y.scale, [-1, *[1] * len(shape)]) if shape else y.scale)
        if y.columns is not None:
            x = g.mul(x, by_column(y.columns))
        return g.add(x, by_column(y.bias)) if y.bias is not None else x


def _float(g: GraphBuilder, value: float) -> ir.Value:
    return g.constant(value, FLOAT)
