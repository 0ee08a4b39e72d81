"""Linears of the transformer in 16 or 32 bits, or quantised: FP8 and INT8 with one scale per token, NVFP4 also per 16.

Quantisation needs no calibration: each row of activations is divided by its largest magnitude and quantised with the
constant scale 1; the product is multiplied by the row's scale and by a vector of the matrix's scales, one per output.
Compilers fuse normalisation, modulation, maximum and quantisation into one kernel, multiply 8-bit numbers, and fold
scales and bias into the next kernel. They do not fuse a per-tensor scale computed at run time, so only measured ones
are supported (``static``).

Two vectors, measured before the export, are free in the same way. ``input_mean`` is subtracted from the rows before
they are scaled, and the bias restores it; a mean computed at run time costs two or three kernels per linear and gains
little, because it multiplies already rounded weights. ``input_factor`` multiplies the rows, and the matrix is divided
by it before it is rounded (SmoothQuant, arXiv 2211.10438): it moves outliers of the rows into the matrix.

An NVFP4 matrix may have a branch of low rank beside it (SVDQuant, arXiv 2411.05007): two small 16-bit matrices that
multiply the rows as they were before NVFP4. The second product adds the large one, in one kernel.

The raw product stays in the compute type, bfloat16: it reaches 2e8, more than float16 holds.

The consumer of a linear requests its float32 values, optionally of some columns or reshaped, and may do so twice: a
norm reads the 16-bit result once for its statistics and once to apply them, which keeps no float32 copy in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from export.graphs.builder import FLOAT, TENSORRT, GraphBuilder
from wan22.block_layout import LOW_RANK_DOWN, LOW_RANK_UP
from wan22.precision import Number

FLOAT8, INT8, FLOAT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8, ir.DataType.FLOAT4E2M1
FLOAT8_MAX, INT8_MAX = 448.0, 127.0
LARGEST_QUANTISED = 440.0  # below FP8's maximum, so that rounding in the division cannot overflow
SMALLEST_ROW = 1e-6  # keeps the scale of an all-zero row positive
GROUP = 16  # inputs with a common scale in NVFP4
OF_ROWS_FP4 = 1 / 2688  # scale of E4M3 scales for rows of at most 1: the largest scale, 448, times the largest code, 6


@dataclass(frozen=True)
class Codes:
    """The codes of a number type with one scale per row."""

    dtype: ir.DataType
    largest: float  # code of a matrix
    largest_of_rows: float  # code of activations
    takes_scales: bool = False  # static ones of its inputs, as publishers measure them


CODES = {
    Number.FP8: Codes(FLOAT8, FLOAT8_MAX, LARGEST_QUANTISED, takes_scales=True),
    Number.INT8: Codes(INT8, INT8_MAX, INT8_MAX),
}


def coded_matrices(g: GraphBuilder) -> dict[str, Number]:
    """The matrices that ``g`` stores as codes, and their number type."""
    numbers = {codes.dtype: number for number, codes in CODES.items()} | {FLOAT4: Number.NVFP4}
    matrices = {key: value.dtype for key, value in g.weights.items() if key.endswith(".weight")}
    return {key: numbers[dtype] for key, dtype in matrices.items() if dtype in numbers}


@dataclass(frozen=True)
class Quantised:
    """What the blocks of a transformer multiply in less than 16 bits; embeddings, modulation, norms and head never do.

    A linear is named by its kind ("ffn.2") or fully ("blocks.3.ffn.2"); ``self_attn.q`` stands for q, k and v,
    ``cross_attn.k`` for k and v.
    """

    self_attention: bool = False  # in FP8
    cross_attention: bool = False  # in FP8
    linears: Number = Number.FP8
    exceptions: Mapping[str, Number] = field(default_factory=dict)  # linears → another type; 16 bits: not quantised
    high_precision_blocks: frozenset[int] = frozenset()  # blocks in 16 bits
    static: frozenset[str] = frozenset()  # full names of FP8 linears with a stored ``input_scale``
    centred: frozenset[str] = frozenset()  # kinds with a stored ``input_mean`` in every block
    smoothed: frozenset[str] = frozenset()  # kinds with a stored ``input_factor`` in every block
    low_rank: int = 0  # of the branch beside every NVFP4 matrix; 0: none

    @property
    def uniform(self) -> bool:
        """True if all blocks compute alike, so that one engine serves every block."""
        single = any(name.startswith("blocks.") for name in self.exceptions)
        return not (self.high_precision_blocks or self.static or single)

    def covers(self, key: str) -> bool:
        """True if ``key``, a linear or an attention ("blocks.3.ffn.2", "blocks.3.self_attn"), may be quantised."""
        return key.startswith("blocks.") and int(key.split(".")[1]) not in self.high_precision_blocks

    def number(self, key: str) -> Number | None:
        """The number type that the linear ``key`` multiplies; None in the compute type."""
        if not self.covers(key):
            return None
        number = self.exceptions.get(key, self.exceptions.get(kind_of(key), self.linears))
        return number if number.bits < 16 else None


def kind_of(key: str) -> str:
    """The kind of a linear: "blocks.3.ffn.2" → "ffn.2"."""
    return key.split(".", 2)[2]


@dataclass(frozen=True)
class Operand:
    """The input of a linear: ``value [L, in]`` in the compute type; the true rows are ``value * scale``."""

    value: ir.Value
    scale: ir.Value | None = None  # float32 [L, 1]
    number: Number | None = None  # of the quantised value
    rows: ir.Value | None = None  # what NVFP4 rounded to ``value``, in the compute type


@dataclass(frozen=True)
class Product:
    """The output of a linear: the true values are ``raw * columns * scale + bias``, in float32."""

    raw: ir.Value  # [L, out], compute type
    scale: ir.Value | None = None  # float32 [L, 1]
    bias: ir.Value | None = None  # float32 [out]
    columns: ir.Value | None = None  # float32 [out], the scales of the matrix's rows


class Linears:
    """Write linears into ``g``. A key is an official name, ``parts`` the linears below it ("qkv": three linears)."""

    def __init__(self, g: GraphBuilder, compute: ir.DataType, quantised: Quantised | None) -> None:
        self.g, self.compute, self.quantised = g, compute, quantised
        self._rows: dict[tuple[ir.Value, Number], Operand] = {}

    def number(self, key: str) -> Number | None:
        """The number type that the linear ``blocks.N. ...`` multiplies; None in the compute type."""
        return None if self.quantised is None else self.quantised.number(key)

    # -- inputs

    def operand(self, x: ir.Value, key: str, width: int) -> Operand:
        """``x [L, width]`` as the input of the linear ``key``, in the type that it multiplies."""
        number = self.number(key)
        if self.quantised is None or number is None:
            return Operand(self.g.cast(x, self.compute))
        if key in self.quantised.static:
            scale = self.g.weight(f"{key}.input_scale", (), FLOAT)
            return Operand(self.through_fp8(self.g.cast(x, FLOAT), scale), number=number)
        return self.per_token(self.prepared(x, key, width), number)

    def prepared(self, x: ir.Value, key: str, width: int) -> ir.Value:
        """``x [L, width]`` without the mean of the linear ``key`` and times its factors, where it has stored ones."""
        if self.quantised is not None and kind_of(key) in self.quantised.centred:
            x = self.g.op("Sub", self.g.cast(x, FLOAT), self.g.weight(f"{key}.input_mean", (width,), FLOAT))
        if self.quantised is not None and kind_of(key) in self.quantised.smoothed:
            x = self.g.mul(self.g.cast(x, FLOAT), self.g.weight(f"{key}.input_factor", (width,), FLOAT))
        return x

    def per_token(self, x: ir.Value, number: Number) -> Operand:
        """``x [L, in]`` quantised with one scale per row; each ``x`` is quantised only once."""
        if (x, number) not in self._rows:
            wide = self.g.cast(x, FLOAT)
            four = number is Number.NVFP4
            made = self.in_fp4(wide) if four else self.quantised_rows(*self.quantise_rows(wide, number), number)
            self._rows[x, number] = made
        return self._rows[x, number]

    def in_fp4(self, x: ir.Value) -> Operand:
        """Float32 ``x [L, in]`` through NVFP4, its rows divided by their largest magnitude before.

        The operator is TensorRT's: standard ones compile to the same products, but with float32 copies of the rows.
        """
        g = self.g
        with g.scope("quantise"):
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([1]), keepdims=1)
            scale = g.op("Max", largest, g.constant(SMALLEST_ROW, FLOAT))
            rows, step = g.cast(g.op("Div", x, scale), self.compute), g.constant(OF_ROWS_FP4, FLOAT)
            how = {"axis": -1, "block_size": GROUP, "scale_type": int(FLOAT8)}
            codes, steps = g.multi("TRT_FP4DynamicQuantize", 2, rows, step, domain=TENSORRT, **how)
            codes.type, steps.type = ir.TensorType(FLOAT4), ir.TensorType(FLOAT8)
            return Operand(self.from_fp4(codes, steps, step), scale, Number.NVFP4, rows)

    def from_fp4(self, codes: ir.Value, steps: ir.Value, step: ir.Value) -> ir.Value:
        """``codes`` in the compute type, times the E4M3 scales ``steps`` of groups and the constant ``step``."""
        wide = self.g.op("DequantizeLinear", steps, step)
        wide.type = ir.TensorType(FLOAT)
        values = self.g.op("DequantizeLinear", codes, wide, axis=-1, block_size=GROUP)
        values.type = ir.TensorType(FLOAT)
        return self.g.cast(values, self.compute)

    def quantise_rows(self, x: ir.Value, number: Number) -> tuple[ir.Value, ir.Value]:
        """The codes of float32 ``x [L, in]`` with one scale per row, and the scales, float32 ``[L, 1]``."""
        g, codes = self.g, CODES[number]
        with g.scope("quantise"):
            largest = g.op("ReduceMax", g.op("Abs", x), g.constant([1]), keepdims=1)
            floor, top = g.constant(SMALLEST_ROW, FLOAT), g.constant(codes.largest_of_rows, FLOAT)
            scale = g.op("Div", g.op("Max", largest, floor), top)
            return self.quantise(g.op("Div", x, scale), g.constant(1.0, FLOAT), codes.dtype), scale

    def quantised_rows(self, rows: ir.Value, scale: ir.Value, number: Number) -> Operand:
        """The input of a linear from codes ``rows [L, in]`` and their ``scale [L, 1]``."""
        return Operand(self.dequantise(rows, self.g.constant(1.0, FLOAT)), scale, number)

    def through_fp8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Quantise float32 ``x`` with a constant ``scale`` and dequantise it to the compute type."""
        return self.dequantise(self.quantise(x, scale), scale)

    def quantise(self, x: ir.Value, scale: ir.Value, dtype: ir.DataType = FLOAT8) -> ir.Value:
        """The codes of float32 ``x`` divided by a constant ``scale``."""
        quantised = self.g.op("QuantizeLinear", x, scale, output_dtype=int(dtype))
        quantised.type = ir.TensorType(dtype)
        return quantised

    # -- the multiplication

    def __call__(self, x: Operand, key: str, parts: str, shape: tuple[int, int]) -> Product:
        """``x [L, in] → [L, len(parts) * out]``; ``shape`` is (in, out) of each of the ``parts`` of ``key``."""
        entering, leaving = shape
        with self.g.scope(parts):
            if x.number is not None:
                bias = self.g.joined([f"{key}.{part}.bias" for part in parts], (leaving,), FLOAT)
                raw, columns = self.quantised_matmul(x, f"{key}.{parts}", (len(parts) * leaving, entering))
                return Product(raw, x.scale, bias, columns)
            weight, bias = (
                self.g.joined([f"{key}.{part}.{leaf}" for part in parts], dims, self.compute)
                for leaf, dims in (("weight", (leaving, entering)), ("bias", (leaving,)))
            )
            return Product(self.g.op("Gemm", x.value, weight, bias, transB=1))

    def quantised_matmul(self, x: Operand, name: str, shape: tuple[int, int]) -> tuple[ir.Value, ir.Value]:
        """``x [L, in]`` times the codes ``name [out, in]`` transposed, in the compute type; their scales ``[out]``.

        One stored matrix for all parts: graphs cannot concatenate codes. The codes are dequantised with the constant 1
        because compilers accept no other scale of a matrix that is an input.
        """
        assert x.number is not None
        g, one = self.g, self.g.constant(1.0, FLOAT)
        if x.number is Number.NVFP4:
            stored = g.weight(f"{name}.weight", shape, FLOAT4)
            steps = g.weight(f"{name}.group_scale", (shape[0], shape[1] // GROUP), FLOAT8)
            matrix = g.transpose(self.from_fp4(stored, steps, one), 1, 0)
        else:
            stored = g.weight(f"{name}.weight", shape, CODES[x.number].dtype)
            matrix = g.transpose(self.dequantise(stored, one), 1, 0)
        raw = g.op("MatMul", x.value, matrix)
        if x.rows is not None and self.quantised is not None and (rank := self.quantised.low_rank):
            down = g.weight(f"{name}.{LOW_RANK_DOWN}", (rank, shape[1]), self.compute)
            up = g.weight(f"{name}.{LOW_RANK_UP}", (shape[0], rank), self.compute)  # divided by the matrix's scales
            raw = g.op("Gemm", g.op("Gemm", x.rows, down, transB=1), up, raw, transB=1)
        return raw, g.weight(f"{name}.weight_scale", shape[:1], FLOAT)

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
        if y.columns is not None:
            x = g.mul(x, by_column(y.columns))
        if y.scale is not None:
            x = g.mul(x, g.reshape(y.scale, [-1, *[1] * len(shape)]) if shape else y.scale)
        return g.add(x, by_column(y.bias)) if y.bias is not None else x
