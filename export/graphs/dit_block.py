"""One block of the transformer: self-attention, cross-attention to the text, feed-forward.

The residual stream is float32 ``[L, D]``. Compilers turn this form into fewer kernels than any other form tried. q, k
and v are one matrix multiplication. A norm over all heads takes its statistics from the flat rows and applies them to
the rows split into heads, which stores no float32 copy of q and k and saves a second pass over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from export.graphs.attention import attention, fp8_attention
from export.graphs.builder import FLOAT, GraphBuilder
from export.graphs.linear import Linears, Operand, Product
from wan22.parts import DitSpec

Columns = tuple[int, int] | None  # first and end; None means all


@dataclass(frozen=True)
class Tables:
    """Values that depend on the video's size and that all blocks share."""

    cos: ir.Value | None  # float32 [L, 1, 1, head/2, 1]; None if nothing is rotated
    sin: ir.Value | None
    first_frame: ir.Value | None  # float32 [L, 1], 1 for tokens of the first frame, if it has its own timestep (TI2V)


class Modulation:
    """Normalise rows and apply a time row: one for all tokens, or one for the first latent frame and one after it."""

    def __init__(self, g: GraphBuilder, spec: DitSpec, tables: Tables) -> None:
        self.g, self.spec, self.tables = g, spec, tables

    def layer_norm(self, x: ir.Value, affine: str | None = None) -> ir.Value:
        g, width = self.g, self.spec.width
        if affine:
            scale, bias = (g.weight(f"{affine}.{leaf}", (width,), FLOAT) for leaf in ("weight", "bias"))
            return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.spec.eps)
        return g.op("LayerNormalization", x, g.constant([1.0] * width, FLOAT), axis=-1, epsilon=self.spec.eps)

    def by_time(self, x: ir.Value, rows: ir.Value, op: str) -> ir.Value:
        """``x [L, D] op rows [time rows, D]``. A mask blends two rows: fewer kernels than a row gathered per frame."""
        g, first = self.g, self.tables.first_frame
        if first is None:
            return g.op(op, x, rows)
        of_first, of_rest = g.split(rows, 2, 0)
        rest = g.op("Sub", g.constant(1.0, FLOAT), first)
        return g.op(op, x, g.add(g.mul(first, of_first), g.mul(rest, of_rest)))

    def __call__(self, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
        """LayerNorm, then ``(1 + scale) · x + shift``."""
        scaled = self.by_time(self.layer_norm(x), self.g.add(scale, self.g.constant(1.0, FLOAT)), "Mul")
        return self.by_time(scaled, shift, "Add")


class Blocks:
    """Write blocks; ``key`` is the official path of a module, such as "blocks.3.self_attn"."""

    def __init__(self, spec: DitSpec, linears: Linears, modulated: Modulation) -> None:
        self.g, self.spec, self.linears, self.modulated = linears.g, spec, linears, modulated

    def __call__(self, key: str, x: ir.Value, modulation: ir.Value, context: ir.Value) -> ir.Value:
        """``x [L, D]``, ``modulation [time rows, 6·D]``, ``context [512, D]`` → ``[L, D]``."""
        g, rows = self.g, self.time_rows(key, modulation)
        with g.scope("self_attn"):
            y = self.self_attention(f"{key}.self_attn", self.modulated(x, *rows[:2]))
        x = self.add_self_attention(x, y, rows)
        with g.scope("cross_attn"):
            normed = self.modulated.layer_norm(x, f"{key}.norm3")
            x = g.add(x, self.cross_attention(f"{key}.cross_attn", normed, context))
        return self.add_feed_forward(key, x, rows)

    def time_rows(self, key: str, modulation: ir.Value) -> tuple[ir.Value, ...]:
        """``[time rows, D]`` each: shift, scale and gate of self-attention, then of the feed-forward."""
        g = self.g
        table = g.reshape(g.weight(f"{key}.modulation", (1, 6, self.spec.width), FLOAT), [1, -1])
        return g.split(g.add(modulation, table), 6, 1)

    def add_self_attention(self, x: ir.Value, y: ir.Value, rows: Sequence[ir.Value]) -> ir.Value:
        with self.g.scope("self_attn"):
            return self.g.add(x, self.modulated.by_time(y, rows[2], "Mul"))

    def add_feed_forward(self, key: str, x: ir.Value, rows: Sequence[ir.Value]) -> ir.Value:
        with self.g.scope("ffn"):
            y = self.feed_forward(f"{key}.ffn", self.modulated(x, *rows[3:5]))
            return self.g.add(x, self.modulated.by_time(y, rows[5], "Mul"))

    # -- modules, float32 in and out

    def self_attention(self, key: str, x: ir.Value) -> ir.Value:
        rotated, qkv = self.project_qkv(key, x)
        q, k = (self.g.reshape(half, [-1, *self.heads]) for half in self.g.split(rotated, 2, 1))
        return self.project_out(key, self.attend(key, q, k, self.values_of(qkv)))

    def project_qkv(self, key: str, x: ir.Value) -> tuple[ir.Value, Product]:
        """q and k, normed and rotated, ``[L, 2, heads, head/2, 2]``, and the product that contains v."""
        width = self.spec.width
        qkv = self.linears(self.linears.operand(x, f"{key}.q", width), key, "qkv", (width, width))
        return self.rotate(self.norm_pairs(key, qkv)), qkv

    def values_of(self, qkv: Product) -> ir.Value:
        return self.linears.values(qkv, (2 * self.spec.width, 3 * self.spec.width), self.heads)

    def cross_attention(self, key: str, x: ir.Value, context: ir.Value) -> ir.Value:
        q = self.text_queries(key, x)
        return self.project_out(key, self.attend(key, q, *self.text_keys_and_values(key, context)))

    def text_queries(self, key: str, x: ir.Value) -> ir.Value:
        """``[L, heads, head]``, divided by ``sqrt(head)``."""
        width = self.spec.width
        q = self.linears(self.linears.operand(x, f"{key}.q", width), key, "q", (width, width))
        return self.norm_heads(f"{key}.norm_q", q, None, self.spec.head_width**-0.5)

    def text_keys_and_values(self, key: str, context: ir.Value | Operand) -> tuple[ir.Value, ir.Value]:
        """K, normed, and V of the text, ``[512, heads, head]`` each."""
        k, v, columns_of_k, columns_of_v = self.keys_and_values(key, context)
        k_heads = self.norm_heads(f"{key}.norm_k", k, columns_of_k)
        return k_heads, self.linears.values(v, columns_of_v, self.heads)

    def keys_and_values(self, key: str, context: ir.Value | Operand) -> tuple[Product, Product, Columns, Columns]:
        """The products that contain K and V of the text, and the columns of each.

        Compilers merge the separate 16-bit linears of all blocks, but no quantised ones, so those two are joined here.
        """
        width = self.spec.width
        entering = context if isinstance(context, Operand) else self.linears.operand(context, f"{key}.k", width)
        if entering.number is not None:
            joined = self.linears(entering, key, "kv", (width, width))
            return joined, joined, (0, width), (width, 2 * width)
        k, v = (self.linears(entering, key, part, (width, width)) for part in "kv")
        return k, v, None, None

    def feed_forward(self, key: str, x: ir.Value) -> ir.Value:
        spec, linears = self.spec, self.linears
        hidden = linears(linears.operand(x, f"{key}.0", spec.width), key, "0", (spec.width, spec.ffn_width))
        raw = hidden.raw if hidden.scale is None and hidden.bias is None else linears.values(hidden)
        hidden_rows = linears.operand(self.g.op("Gelu", raw, approximate="tanh"), f"{key}.2", spec.ffn_width)
        return linears.values(linears(hidden_rows, key, "2", (spec.ffn_width, spec.width)))

    def attend(self, key: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Attention in the type chosen for ``key``: ``[L, D]``."""
        if self.attends_in_fp8(key):
            y = fp8_attention(self.linears, key, q, k, v)
        else:
            y = attention(self.g, self.linears.compute, q, k, v)
        return self.g.reshape(y, [-1, self.spec.width])

    def project_out(self, key: str, rows: ir.Value | Operand) -> ir.Value:
        """The output projection of an attention."""
        width = self.spec.width
        entering = rows if isinstance(rows, Operand) else self.linears.operand(rows, f"{key}.o", width)
        return self.linears.values(self.linears(entering, key, "o", (width, width)))

    def attends_in_fp8(self, key: str) -> bool:
        quantised = self.linears.quantised
        if quantised is None or not quantised.covers(key):
            return False
        return quantised.self_attention if key.endswith("self_attn") else quantised.cross_attention

    # -- norms over all D channels, before they are split into heads

    @property
    def heads(self) -> tuple[int, int]:
        return (self.spec.heads, self.spec.head_width)

    def norm_heads(self, key: str, y: Product, columns: Columns, factor: float = 1.0) -> ir.Value:
        """RMSNorm of ``columns`` of ``y`` with the weight ``key``, times ``factor``: ``[rows, heads, head]``."""
        g = self.g
        with g.scope(key.rsplit(".", 1)[-1]):
            inverse = g.reshape(self._inverse_rms(self.linears.values(y, columns), 1), [-1, 1, 1])
            weight = self._weight(key, self.heads, factor)
            return g.mul(g.mul(self.linears.values(y, columns, self.heads), inverse), weight)

    def norm_pairs(self, key: str, qkv: Product) -> ir.Value:
        """RMSNorm of q and k together, q divided by ``sqrt(head)``: ``[L, 2, heads, head/2, 2]``."""
        g, spec = self.g, self.spec
        split = [spec.heads, spec.head_width // 2, 2]
        with g.scope("norm_qk"):
            flat = self.linears.values(qkv, shape=[3, spec.width])  # includes v: slicing it off would copy q and k
            inverse = g.reshape(g.slice(self._inverse_rms(flat, 2), 1, 0, 2), [-1, 2, 1, 1, 1])
            factors = {"q": spec.head_width**-0.5, "k": 1.0}
            weight = g.concat([self._weight(f"{key}.norm_{n}", [1, *split], f) for n, f in factors.items()], 0)
            values = self.linears.values(qkv, (0, 2 * spec.width), [2, *split])
            return g.mul(g.mul(values, inverse), weight)

    def rotate(self, x: ir.Value) -> ir.Value:
        """Rotary embedding of interleaved pairs: ``(a, b) → (a·cos - b·sin, a·sin + b·cos)``."""
        g, cos, sin = self.g, self.modulated.tables.cos, self.modulated.tables.sin
        assert cos is not None and sin is not None
        with g.scope("rope"):
            a, b = g.split(x, 2, -1)
            first = g.op("Sub", g.mul(a, cos), g.mul(b, sin))
            second = g.add(g.mul(a, sin), g.mul(b, cos))
            return g.concat([first, second], -1)

    def _inverse_rms(self, x: ir.Value, axis: int) -> ir.Value:
        g = self.g
        mean = g.op("ReduceMean", g.mul(x, x), g.constant([axis]), keepdims=1)
        return g.op("Reciprocal", g.op("Sqrt", g.add(mean, g.constant(self.spec.eps, FLOAT))))

    def _weight(self, key: str, shape: Sequence[int], factor: float) -> ir.Value:
        weight = self.g.reshape(self.g.weight(f"{key}.weight", (self.spec.width,), FLOAT), list(shape))
        return weight if factor == 1.0 else self.g.mul(weight, self.g.constant(factor, FLOAT))
