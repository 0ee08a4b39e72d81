"""Softmax attention without a mask, written as MatMul, Softmax, MatMul, which compilers fuse into one kernel.

In this form the result needs no copy before the output projection, and only this form is also fused in FP8
(``Attention`` with quantised inputs is not). FP8 attention needs no calibration:

* K is centred over all tokens. Softmax is invariant to this (every logit of a row shifts equally), and it removes the
  outliers of K, channels that are large for every token. This is SageAttention's smoothing (arXiv 2410.02367).
* V is scaled per channel by its largest magnitude. The result is linear in each channel of V, so multiplying the
  result by the scale is exact.
* Q and K have constant scales that cannot overflow: after RMSNorm over D channels no value exceeds ``sqrt(D)`` times
  the largest norm weight, and rotation preserves this bound. FP8 is a floating type, so a loose bound does no harm.
* Probabilities are at most 1, so their scale is 1/448.
"""

import onnx_ir as ir

from export.graphs.builder import FLOAT, GraphBuilder
from export.graphs.linear import FLOAT8_MAX, LARGEST_QUANTISED, SMALLEST_ROW, Linears


def attention(
    g: GraphBuilder, compute: ir.DataType, q: ir.Value, k: ir.Value, v: ir.Value, *, by_head: bool = False
) -> ir.Value:
    """Attention of float32 ``q [L, heads, head]``, already divided by ``sqrt(head)``, to ``k, v [S, heads, head]``.

    Computes in ``compute`` and returns ``[L, heads, head]`` in ``compute``, or ``[heads, L, head]`` if ``by_head``.
    """
    q, k, v = (g.cast(x, compute) for x in (q, k, v))
    probabilities = g.op("Softmax", g.op("MatMul", _by_head(g, q), _by_head(g, k, turned=True)), axis=-1)
    y = g.op("MatMul", probabilities, _by_head(g, v))
    return g.op("Squeeze", y, g.constant([0])) if by_head else _by_token(g, y)


def fp8_attention(linears: Linears, key: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    """Same as :func:`attention` in FP8; returns float32. The weights contain ``q_scale`` and ``k_scale`` of ``key``."""
    g = linears.g
    k = _centre(g, k)
    v, v_scale = _scale_channels(g, v)
    q8 = linears.through_fp8(_by_head(g, q), g.weight(f"{key}.q_scale", (), FLOAT))
    k8 = linears.through_fp8(_by_head(g, k, turned=True), g.weight(f"{key}.k_scale", (), FLOAT))
    v8 = linears.through_fp8(_by_head(g, v), g.constant(1.0, FLOAT))
    return g.mul(g.cast(_by_token(g, _of_fp8(linears, q8, k8, v8)), FLOAT), v_scale)


def attention_of_fp8(
    linears: Linears, key: str, q: ir.Value, k: ir.Value, v: ir.Value, v_scale: ir.Value | None = None
) -> ir.Value:
    """:func:`fp8_attention` of operands that are in FP8 already: ``[L, heads, head]``, V divided by ``v_scale``.

    They are dequantised before anything else: compilers refuse any other reader of an FP8 tensor. Without ``v_scale``
    the result is ``[heads, L, head]`` in 16 bits, and still divided by it.
    """
    g = linears.g
    scales = (g.weight(f"{key}.q_scale", (), FLOAT), g.weight(f"{key}.k_scale", (), FLOAT), g.constant(1.0, FLOAT))
    q, k, v = (linears.dequantise(x, scale) for x, scale in zip((q, k, v), scales, strict=True))
    y = _of_fp8(linears, _by_head(g, q), _by_head(g, k, turned=True), _by_head(g, v))
    if v_scale is None:
        return g.op("Squeeze", y, g.constant([0]))
    return g.mul(g.cast(_by_token(g, y), FLOAT), v_scale)


def _of_fp8(linears: Linears, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    """``[1, heads, L, head]`` from dequantised operands by head."""
    g = linears.g
    probabilities = g.op("Softmax", g.op("MatMul", q, k), axis=-1)
    p8 = linears.through_fp8(probabilities, g.constant(1 / FLOAT8_MAX, FLOAT))
    return g.op("MatMul", p8, v)


def _by_head(g: GraphBuilder, x: ir.Value, *, turned: bool = False) -> ir.Value:
    """``[L, heads, head] → [1, heads, L, head]``, or ``[1, heads, head, L]`` when ``turned``."""
    order = (1, 2, 0) if turned else (1, 0, 2)
    return g.op("Unsqueeze", g.transpose(x, *order), g.constant([0]))


def _by_token(g: GraphBuilder, x: ir.Value) -> ir.Value:
    return g.op("Squeeze", g.transpose(x, 0, 2, 1, 3), g.constant([0]))


def _centre(g: GraphBuilder, k: ir.Value) -> ir.Value:
    with g.scope("smooth_k"):
        return g.op("Sub", k, g.op("ReduceMean", k, g.constant([0]), keepdims=1))


def _scale_channels(g: GraphBuilder, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``v`` divided by the largest magnitude of each channel over the tokens, and that scale."""
    with g.scope("scale_v"):
        largest = g.op("ReduceMax", g.op("Abs", v), g.constant([0]), keepdims=1)
        floor, top = g.constant(SMALLEST_ROW, FLOAT), g.constant(LARGEST_QUANTISED, FLOAT)
        scale = g.op("Div", g.op("Max", largest, floor), top)
        return g.op("Div", v, scale), scale
