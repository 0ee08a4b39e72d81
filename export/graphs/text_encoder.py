"""The encoder half of umt5 as an ONNX graph, for one unpadded prompt of up to 512 tokens.

Encoding only the real tokens gives the same rows as encoding 512 padded tokens with a mask, so the graph needs no mask.
Residual stream and normalisation are float32; everything else uses the compute type.
"""

import math

import numpy as np
import onnx_ir as ir

from export.graphs.blocks import BLOCK, StageGraph
from export.graphs.builder import FLOAT, FLOAT16, INT64, GraphBuilder
from export.graphs.linear import Linears, Product, Quantised
from wan22.parts import TextEncoderSpec
from wan22.specs import TEXT_TOKENS


def relative_buckets(spec: TextEncoderSpec) -> np.ndarray:
    """The bias row for each distance (key minus query) from -511 to 511: int64 [1023].

    Half of the buckets look back, half forward; in each half, the first buckets hold one distance each and the others
    grow logarithmically up to ``max_distance`` (T5's bidirectional buckets, in float32 like the references).
    """
    side, exact = spec.buckets // 2, spec.buckets // 4
    distance = np.arange(1 - TEXT_TOKENS, TEXT_TOKENS)
    size = np.abs(distance)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    grown = exact + (ratio / np.float32(math.log(spec.max_distance / exact)) * (side - exact)).astype(np.int64)
    bucket = np.where(size < exact, size, np.minimum(grown, side - 1))
    return np.asarray(bucket + np.where(distance > 0, side, 0), np.int64)


def text_encoder_graph(
    spec: TextEncoderSpec, compute: ir.DataType = FLOAT, *, fp8_feed_forward: bool = False
) -> GraphBuilder:
    """The graph from ``input_ids`` int64 [1, tokens] to ``embeddings`` float32 [1, tokens, width]."""
    g = GraphBuilder("text_encoder")
    writer = _TextEncoder(g, spec, compute, Linears(g, compute, Quantised()) if fp8_feed_forward else None)
    ids = g.input("input_ids", INT64, [1, "tokens"])
    buckets = writer.buckets(ids)
    table = g.weight("token_embedding.weight", (spec.vocab, spec.width), compute)
    x = g.cast(g.op("Gather", table, g.reshape(ids, [-1]), axis=0), FLOAT)
    for index in range(spec.layers):
        with g.scope(f"blocks.{index}"):
            x = writer.block(f"blocks.{index}", x, buckets)
    x = writer.norm(x, "norm")
    g.output("embeddings", g.op("Unsqueeze", x, g.constant([0])), [1, "tokens", spec.width])
    return g


def text_stages(
    spec: TextEncoderSpec, compute: ir.DataType = FLOAT, *, fp8_feed_forward: bool = False
) -> dict[str, StageGraph]:
    """The encoder in parts that take their weights as inputs: ``layer``, which every layer calls, and ``norm``.

    ``x`` is float32 [tokens, width], at first the rows of the embedding, which a caller can gather without a graph.
    """
    layer, norm = StageGraph("layer"), StageGraph("norm")
    writer = _TextEncoder(layer, spec, compute, Linears(layer, compute, Quantised()) if fp8_feed_forward else None)
    x = layer.input("x", FLOAT, ["tokens", spec.width])
    with layer.scope(BLOCK):
        layer.output("x_out", writer.block(BLOCK, x, writer.buckets(x, axis=0)), ["tokens", spec.width])
    x = norm.input("x", FLOAT, ["tokens", spec.width])
    x = _TextEncoder(norm, spec, compute, None).norm(x, "norm")
    norm.output("embeddings", norm.op("Unsqueeze", x, norm.constant([0])), [1, "tokens", spec.width])
    return {"layer": layer, "norm": norm}


class _TextEncoder:
    """The parts of the encoder, named like the official modules; ``g`` collects their nodes."""

    def __init__(
        self, g: GraphBuilder, spec: TextEncoderSpec, compute: ir.DataType, fp8_linears: Linears | None
    ) -> None:
        self.g, self.spec, self.compute, self.fp8_linears = g, spec, compute, fp8_linears

    def buckets(self, ids: ir.Value, axis: int = 1) -> ir.Value:
        """The bias row of every pair of tokens: int64 [tokens, tokens], shared by all layers.

        ``axis`` is that of the tokens in ``ids``.
        """
        g = self.g
        with g.scope("relative_buckets"):
            count = g.op("Squeeze", g.op("Shape", ids, start=axis, end=axis + 1))
            place = g.op("Range", g.constant(0), count, g.constant(1))
            key, query = (g.op("Unsqueeze", place, g.constant([side])) for side in (0, 1))
            distance = g.add(g.op("Sub", key, query), g.constant(TEXT_TOKENS - 1))
            return g.op("Gather", g.constant(relative_buckets(self.spec)), distance)

    def linear(self, x: ir.Value, key: str, width: tuple[int, int], dtype: ir.DataType) -> ir.Value:
        """``x [tokens, in] → [tokens, out]`` in ``dtype``, without a bias; ``width`` is (in, out)."""
        with self.g.scope(key.rsplit(".", 1)[-1]):
            weight = self.g.weight(f"{key}.weight", width[::-1], dtype)
            return self.g.op("Gemm", self.g.cast(x, dtype), weight, transB=1)

    def norm(self, x: ir.Value, key: str) -> ir.Value:
        weight = self.g.weight(f"{key}.weight", (self.spec.width,), FLOAT)
        return self.g.op("RMSNormalization", x, weight, axis=-1, epsilon=self.spec.eps)

    def block(self, key: str, x: ir.Value, buckets: ir.Value) -> ir.Value:
        g = self.g
        with g.scope("attn"):
            table = g.weight(
                f"{key}.pos_embedding.embedding.weight", (self.spec.buckets, self.spec.heads), self.compute
            )
            bias = g.transpose(g.op("Gather", table, buckets, axis=0), 2, 0, 1)
            bias = g.op("Unsqueeze", bias, g.constant([0]))  # [1, heads, tokens, tokens]
            x = g.add(x, g.cast(self.attention(f"{key}.attn", self.norm(x, f"{key}.norm1"), bias), FLOAT))
        with g.scope("ffn"):
            return g.add(x, g.cast(self.feed_forward(f"{key}.ffn", self.norm(x, f"{key}.norm2")), FLOAT))

    def attention(self, key: str, x: ir.Value, bias: ir.Value) -> ir.Value:
        g, spec = self.g, self.spec
        inner = spec.heads * spec.head_width
        x = g.cast(x, self.compute)
        heads = []
        for leaf in "qkv":
            y = self.linear(x, f"{key}.{leaf}", (spec.width, inner), self.compute)
            y = g.transpose(g.reshape(y, [-1, spec.heads, spec.head_width]), 1, 0, 2)
            heads.append(g.op("Unsqueeze", y, g.constant([0])))
        y = g.op("Attention", *heads, bias, scale=1.0)  # T5 does not divide by the square root of the head width
        y = g.reshape(g.transpose(y, 0, 2, 1, 3), [-1, inner])
        return self.linear(y, f"{key}.o", (inner, spec.width), self.compute)

    def feed_forward(self, key: str, x: ir.Value) -> ir.Value:
        g, widths = self.g, (self.spec.width, self.spec.ffn_width)
        if self.fp8_linears is not None:
            gate = g.op("Gelu", self.fp8_linear(x, f"{key}.gate.0", widths), approximate="tanh")
            return self.fp8_linear(g.mul(gate, self.fp8_linear(x, f"{key}.fc1", widths)), f"{key}.fc2", widths[::-1])
        x = g.cast(x, self.compute)
        gate = g.op("Gelu", self.linear(x, f"{key}.gate.0", widths, self.compute), approximate="tanh")
        hidden = self.linear(x, f"{key}.fc1", widths, self.compute)
        # umt5's gated activations exceed float16's range, so the product and the projection run in float32.
        last = FLOAT if self.compute == FLOAT16 else self.compute
        product = g.mul(g.cast(gate, last), g.cast(hidden, last))
        return self.linear(product, f"{key}.fc2", widths[::-1], last)

    def fp8_linear(self, x: ir.Value, key: str, width: tuple[int, int]) -> ir.Value:
        """``x [tokens, in] → [tokens, out]``, float32 in and out, multiplied in FP8; ``width`` is (in, out)."""
        g, linears = self.g, self.fp8_linears
        assert linears is not None
        with g.scope(key.rsplit(".", 1)[-1]):
            number = linears.number(key)
            assert number is not None
            rows = linears.per_token(x, number)
            raw, columns = linears.quantised_matmul(rows, key, width[::-1])
            return linears.values(Product(raw, rows.scale, columns=columns))
