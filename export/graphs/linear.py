"""Linears of the transformer in 16 or 32 bits, or in FP8 with a scale for every token.

FP8 needs no calibration: each row of activations is divided by its own largest magnitude, quantised with the constant
scale 1, and its scale multiplies the result afterwards. Compilers make one kernel of normalisation, modulation, maximum
and quantisation, an FP8 matrix multiplication, and fold scale and bias into whatever follows. A scale computed for the
whole tensor at run time is not fused, so it is not offered; one measured beforehand is (``static``). The same goes for
the mean of an input over its tokens: measured beforehand (``centred``) it costs no kernel, taken at run time it costs
two or three for every linear, memory for the centred rows, and brings back less than it promises, since what it is
multiplied by are weights that are rounded already.

What follows a linear asks for its float32 values, perhaps of some columns, perhaps reshaped. It may ask twice: a norm
that reads the 16-bit result once for its statistics and once to apply them keeps no float32 copy of it in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from export.graphs.builder import FLOAT, GraphBuilder

FLOAT8 = ir.DataType.FLOAT8E4M3FN
FLOAT8_MAX = 448.0
LARGEST_QUANTISED = 440.0  # a little below, so that the division's rounding cannot overflow
SMALLEST_ROW = 1e-6  # keeps the scale of a row of zeros positive


@dataclass(frozen=True)
class Fp8:
    """What of the transformer's blocks is computed in FP8; embeddings, modulation, norms and head never are."""

    self_attention: bool = False
    cross_attention: bool = False
    high_precision_blocks: frozenset[int] = frozenset()  # blocks without any FP8
    static: frozenset[str] = frozenset()  # linears ("blocks.0.ffn.0") with a stored ``input_scale``
    centred: Mapping[str, int] = field(default_factory=dict)  # linears with a stored ``input_mean`` → its length

    def covers(self, key: str) -> bool:
        """Whether ``key``, a linear or an attention ("blocks.3.ffn.2", "blocks.3.self_attn"), may run in FP8."""
        return key.startswith("blocks.") and int(key.split(".")[1]) not in self.high_precision_blocks


@dataclass(frozen=True)
class Operand:
    """What enters a linear: ``value [L, in]`` in the compute type; the true rows are ``value * scale``."""

    value: ir.Value
    scale: ir.Value | None = None  # float32 [L, 1]
    fp8: bool = False


@dataclass(frozen=True)
class Product:
    """What leaves a linear: the true values are ``raw * scale + bias``, in float32."""

    raw: ir.Value  # [L, out], compute type
    scale: ir.Value | None = None  # float32 [L, 1]
    bias: ir.Value | None = None  # float32 [out]


class Linears:
    """Writes linears into ``g``; keys are official names, ``parts`` the names below a key ("qkv" is three linears)."""

    def __init__(self, g: GraphBuilder, compute: ir.DataType, fp8: Fp8 | None) -> None:
        self.g, self.compute, self.fp8 = g, compute, fp8
        self._quantised: dict[ir.Value, Operand] = {}

    def runs_fp8(self, key: str) -> bool:
        """Whether the linear ``blocks.N. ...`` multiplies FP8 numbers."""
        return self.fp8 is not None and self.fp8.covers(key)

    # -- what enters

    def operand(self, x: ir.Value, key: str) -> Operand:
        """``x [L, in]`` for the linears below ``key`` that read it, quantised where they run in FP8."""
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
        """``x [L, in]`` quantised, each row with its own scale; the same ``x`` is quantised once."""
        if x not in self._quantised:
            self._quantised[x] = self._per_token(self.g.cast(x, FLOAT))
        return self._quantised[x]

    def _per_token(self, x: ir.Value) -> Operand:
        g = self.g
        with g.scope("quantise"):
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([1]), keepdims=1)
            scale = g.op("Div", g.op("Max", largest, g.constant(SMALLEST_ROW, FLOAT)), _float(g, LARGEST_QUANTISED))
            return Operand(self.through_fp8(g.op("Div", x, scale), _float(g, 1.0)), scale, fp8=True)

    def through_fp8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Quantises float32 ``x`` with a constant ``scale`` and dequantises it to the compute type."""
        g = self.g
        quantised = g.op("QuantizeLinear", x, scale, output_dtype=int(FLOAT8))
        return self._dequantised(quantised, scale)

    # -- the multiplication

    def __call__(self, x: Operand, key: str, parts: str, shape: tuple[int, int]) -> Product:
        """``x [L, in] → [L, len(parts) * out]``; ``shape`` is (in, out) of each of the ``parts`` of ``key``."""
        entering, leaving = shape
        with self.g.scope(parts):
            if x.fp8:
                return self._fp8_product(x, f"{key}.{parts}", (len(parts) * leaving, entering), key, parts)
            weight, bias = (
                self._joined([f"{key}.{part}.{leaf}" for part in parts], dims, self.compute)
                for leaf, dims in (("weight", (leaving, entering)), ("bias", (leaving,)))
            )
            return Product(self.g.op("Gemm", x.value, weight, bias, transB=1))

    def _fp8_product(self, x: Operand, name: str, shape: tuple[int, int], key: str, parts: str) -> Product:
        """Several parts are one stored matrix with one scale: graphs cannot join FP8 constants."""
        raw = self.fp8_matmul(x, name, shape)
        each = shape[0] // len(parts)
        return Product(raw, x.scale, self._joined([f"{key}.{part}.bias" for part in parts], (each,), FLOAT))

    def fp8_matmul(self, x: Operand, name: str, shape: tuple[int, int]) -> ir.Value:
        """``x [L, in]`` times the stored matrix ``name [out, in]``, transposed, in the compute type."""
        stored = self.g.weight(f"{name}.weight", shape, FLOAT8)
        matrix = self._dequantised(stored, self.g.weight(f"{name}.weight_scale", (), FLOAT))
        return self.g.op("MatMul", x.value, self.g.transpose(matrix, 1, 0))

    def _joined(self, keys: Sequence[str], shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        weights = [self.g.weight(key, shape, dtype) for key in keys]
        return weights[0] if len(weights) == 1 else self.g.concat(weights, 0)

    def _dequantised(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """The scale stays float32 whatever comes out: a 16-bit one would overflow or lose the product's range."""
        value = self.g.op("DequantizeLinear", x, scale, output_dtype=int(self.compute))
        value.type = ir.TensorType(self.compute)
        return value

    # -- what leaves

    def values(
        self, y: Product, columns: tuple[int, int] | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Float32 values of ``y [L, out]``, of ``columns`` (first, end) only, each row in ``shape``."""
        g, raw, bias = self.g, y.raw, y.bias
        if columns:
            raw = g.slice(raw, 1, *columns)
            bias = g.slice(bias, 0, *columns) if bias is not None else None
        if shape:
            raw = g.reshape(raw, [-1, *shape])
            bias = g.reshape(bias, list(shape)) if bias is not None else None
        x = g.cast(raw, FLOAT)
        if y.scale is not None:
            x = g.mul(x, g.reshape(y.scale, [-1, *[1] * len(shape)]) if shape else y.scale)
        return g.add(x, bias) if bias is not None else x


def _float(g: GraphBuilder, value: float) -> ir.Value:
    return g.constant(value, FLOAT)
