"""The diffusion transformer (an expert) as an ONNX graph.

Tokens are rows of a ``[L, D]`` matrix throughout; the batch of one exists only at the edges and around attention. The
residual stream, normalisation, modulation, rotary embedding, time embedding and output head compute in float32, the
other matrix multiplications in the compute type: the islands of the official code under autocast. Sinusoid and rotary
tables come in from outside, so the graph holds no position or timestep arithmetic of its own.
"""

from dataclasses import dataclass

import onnx_ir as ir

from export.graph import FLOAT, GraphBuilder
from wan22.specs import PATCH, TEXT_TOKENS, DitSpec


@dataclass(frozen=True)
class LatentDims:
    """Latent frames, rows and columns: numbers where the shapes are fixed, names where they are dynamic."""

    frames: int | str = "frames"
    height: int | str = "height"
    width: int | str = "width"

    @property
    def grid(self) -> tuple[int | str, int | str, int | str]:
        """The same in tokens."""
        rows = self.height // PATCH[1] if isinstance(self.height, int) else "rows"
        columns = self.width // PATCH[2] if isinstance(self.width, int) else "columns"
        return self.frames, rows, columns


def dit_graph(spec: DitSpec, compute: ir.DataType = FLOAT, dims: LatentDims | None = None) -> GraphBuilder:
    """The velocity of ``latents`` at a timestep.

    Inputs, all float32: ``latents`` [1, z, T, h, w]; ``condition`` [1, c, T, h, w] where the model has one;
    ``time_features`` [rows, 256]; ``text`` [1, 512, text width]; ``rope_cos``, ``rope_sin`` [T, h/2, w/2, head/2].
    Output: ``velocity`` [1, z, T, h, w] float32, about noise minus clean latents.
    """
    dims = dims or LatentDims()
    g = GraphBuilder("dit")
    writer = _Dit(g, spec, compute)
    video = (dims.frames, dims.height, dims.width)
    latents = g.input("latents", FLOAT, [1, spec.out_channels, *video])
    entering = [latents]
    if spec.condition_channels:
        entering.append(g.input("condition", FLOAT, [1, spec.condition_channels, *video]))
    time_features = g.input("time_features", FLOAT, [spec.time_rows, spec.freq_width])
    text = g.input("text", FLOAT, [1, TEXT_TOKENS, spec.text_width])
    rope = tuple(g.input(f"rope_{f}", FLOAT, [*dims.grid, spec.head_width // 2]) for f in ("cos", "sin"))

    writer.shapes(latents, rope[0])
    x = writer.patch_embedding(g.concat(entering, 1) if len(entering) > 1 else latents)
    time, modulation = writer.time_embedding(time_features)
    context = writer.text_embedding(text)
    for index in range(spec.layers):
        with g.scope(f"blocks.{index}"):
            x = writer.block(f"blocks.{index}", x, modulation, context)
    g.output("velocity", writer.head(x, time, latents), [1, spec.out_channels, *video])
    return g


class _Dit:
    """The parts of the transformer, named as the official modules; ``g`` collects their nodes."""

    def __init__(self, g: GraphBuilder, spec: DitSpec, compute: ir.DataType) -> None:
        self.g, self.spec, self.compute = g, spec, compute

    # -- shapes and tables shared by all blocks

    def shapes(self, latents: ir.Value, rope_cos: ir.Value) -> None:
        """What depends on the video's size: token grid, rotary tables, the frame each token row belongs to."""
        g, half = self.g, self.spec.head_width // 2
        with g.scope("shapes"):
            self.frames = g.op("Shape", latents, start=2, end=3)
            self.grid = g.op("Shape", rope_cos, start=0, end=3)
            self.cos, self.sin = (g.reshape(table, [-1, 1, half, 1]) for table in (rope_cos, g.graph.inputs[-1]))
            if self.spec.time_rows > 1:
                scalar = g.op("Squeeze", self.frames)
                numbers = g.op("Range", g.constant(0), scalar, g.constant(1))
                self.time_row_of_frame = g.op("Min", numbers, g.constant(1))

    # -- pieces

    def linear(self, x: ir.Value, key: str, width: tuple[int, int], dtype: ir.DataType | None = None) -> ir.Value:
        """``x [rows, in] → [rows, out]`` in ``dtype`` (the compute type unless said); ``width`` is (in, out)."""
        g, dtype = self.g, self.compute if dtype is None else dtype
        entering, leaving = width
        with g.scope(key.rsplit(".", 1)[-1]):
            weight = g.weight(f"{key}.weight", (leaving, entering), dtype)
            bias = g.weight(f"{key}.bias", (leaving,), dtype)
            return g.op("Gemm", g.cast(x, dtype), weight, bias, transB=1)

    def layer_norm(self, x: ir.Value, affine: str | None = None) -> ir.Value:
        g, width = self.g, self.spec.width
        if affine:
            scale, bias = (g.weight(f"{affine}.{leaf}", (width,), FLOAT) for leaf in ("weight", "bias"))
            return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.spec.eps)
        return g.op("LayerNormalization", x, g.constant([1.0] * width, FLOAT), axis=-1, epsilon=self.spec.eps)

    def per_frame(self, x: ir.Value, rows: ir.Value, op: str) -> ir.Value:
        """``x [L, D] op rows``: one row of modulation for all tokens, or each latent frame's own (TI2V)."""
        g, width = self.g, self.spec.width
        if self.spec.time_rows == 1:
            return g.op(op, x, rows)
        by_frame = g.op("Reshape", x, g.concat([self.frames, g.constant([-1, width])], 0))
        frame_rows = g.op("Unsqueeze", g.op("Gather", rows, self.time_row_of_frame, axis=0), g.constant([1]))
        return g.reshape(g.op(op, by_frame, frame_rows), [-1, width])

    def modulated(self, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
        """LayerNorm, then ``(1 + scale) · x + shift``."""
        scaled = self.per_frame(self.layer_norm(x), self.g.add(scale, self.g.constant(1.0, FLOAT)), "Mul")
        return self.per_frame(scaled, shift, "Add")

    # -- modules

    def patch_embedding(self, video: ir.Value) -> ir.Value:
        """``[1, C, T, h, w] → [L, D]`` float32, tokens ordered frame, row, column."""
        g, spec = self.g, self.spec
        with g.scope("patch_embedding"):
            weight = g.weight("patch_embedding.weight", (spec.width, spec.in_channels, *PATCH), self.compute)
            bias = g.weight("patch_embedding.bias", (spec.width,), self.compute)
            x = g.op("Conv", g.cast(video, self.compute), weight, bias, strides=PATCH, kernel_shape=PATCH)
            x = g.transpose(g.reshape(x, [spec.width, -1]), 1, 0)
            return g.cast(x, FLOAT)

    def time_embedding(self, features: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``[rows, 256]`` → the embedding ``[rows, D]`` and the modulation ``[rows, 6·D]``, all float32."""
        g, width = self.g, self.spec.width
        with g.scope("time_embedding"):
            x = self.linear(features, "time_embedding.0", (self.spec.freq_width, width), FLOAT)
            time = self.linear(g.silu(x), "time_embedding.2", (width, width), FLOAT)
        with g.scope("time_projection"):
            return time, self.linear(g.silu(time), "time_projection.1", (width, 6 * width), FLOAT)

    def text_embedding(self, text: ir.Value) -> ir.Value:
        """``[1, 512, text width] → [512, D]``; zero rows become a constant that attention does see."""
        g, spec = self.g, self.spec
        with g.scope("text_embedding"):
            x = self.linear(g.reshape(text, [-1, spec.text_width]), "text_embedding.0", (spec.text_width, spec.width))
            x = g.op("Gelu", x, approximate="tanh")
            return self.linear(x, "text_embedding.2", (spec.width, spec.width))

    def block(self, key: str, x: ir.Value, modulation: ir.Value, context: ir.Value) -> ir.Value:
        g, spec = self.g, self.spec
        table = g.reshape(g.weight(f"{key}.modulation", (1, 6, spec.width), FLOAT), [1, -1])
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = g.split(g.add(modulation, table), 6, 1)
        with g.scope("self_attn"):
            y = self.self_attention(f"{key}.self_attn", self.modulated(x, shift_sa, scale_sa))
            x = g.add(x, self.per_frame(g.cast(y, FLOAT), gate_sa, "Mul"))
        with g.scope("cross_attn"):
            y = self.cross_attention(f"{key}.cross_attn", self.layer_norm(x, f"{key}.norm3"), context)
            x = g.add(x, g.cast(y, FLOAT))
        with g.scope("ffn"):
            y = self.feed_forward(f"{key}.ffn", self.modulated(x, shift_ffn, scale_ffn))
            return g.add(x, self.per_frame(g.cast(y, FLOAT), gate_ffn, "Mul"))

    def self_attention(self, key: str, x: ir.Value) -> ir.Value:
        square = (self.spec.width, self.spec.width)
        x = self.g.cast(x, self.compute)
        q, k = (self.rotated(self.normed_heads(self.linear(x, f"{key}.{p}", square), f"{key}.norm_{p}")) for p in "qk")
        return self.attention(key, q, k, self.linear(x, f"{key}.v", square))

    def cross_attention(self, key: str, x: ir.Value, context: ir.Value) -> ir.Value:
        square = (self.spec.width, self.spec.width)
        q = self.normed_heads(self.linear(x, f"{key}.q", square), f"{key}.norm_q")
        k = self.normed_heads(self.linear(context, f"{key}.k", square), f"{key}.norm_k")
        return self.attention(key, q, k, self.linear(context, f"{key}.v", square))

    def normed_heads(self, x: ir.Value, key: str) -> ir.Value:
        """RMSNorm over all D channels, before they are split: ``[L, D] → [L, heads, head]`` float32."""
        g, spec = self.g, self.spec
        with g.scope(key.rsplit(".", 1)[-1]):
            weight = g.weight(f"{key}.weight", (spec.width,), FLOAT)
            x = g.op("RMSNormalization", g.cast(x, FLOAT), weight, axis=-1, epsilon=spec.eps)
            return g.reshape(x, [-1, spec.heads, spec.head_width])

    def rotated(self, x: ir.Value) -> ir.Value:
        """Rotary embedding of interleaved pairs: ``(a, b) → (a·cos - b·sin, a·sin + b·cos)``, float32."""
        g, spec = self.g, self.spec
        with g.scope("rope"):
            a, b = g.split(g.reshape(x, [-1, spec.heads, spec.head_width // 2, 2]), 2, -1)
            first = g.op("Sub", g.mul(a, self.cos), g.mul(b, self.sin))
            second = g.add(g.mul(a, self.sin), g.mul(b, self.cos))
            return g.reshape(g.concat([first, second], -1), [-1, spec.heads, spec.head_width])

    def attention(self, key: str, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Softmax attention without a mask, then the output projection; ``q, k [L, heads, head]``, ``v [L, D]``."""
        g, spec = self.g, self.spec
        v = g.reshape(v, [-1, spec.heads, spec.head_width])
        heads = [g.op("Unsqueeze", g.transpose(g.cast(x, self.compute), 1, 0, 2), g.constant([0])) for x in (q, k, v)]
        y = g.op("Attention", *heads, scale=spec.head_width**-0.5)
        y = g.reshape(g.transpose(y, 0, 2, 1, 3), [-1, spec.width])
        return self.linear(y, f"{key}.o", (spec.width, spec.width))

    def feed_forward(self, key: str, x: ir.Value) -> ir.Value:
        spec = self.spec
        hidden = self.linear(x, f"{key}.0", (spec.width, spec.ffn_width))
        hidden = self.g.op("Gelu", hidden, approximate="tanh")
        return self.linear(hidden, f"{key}.2", (spec.ffn_width, spec.width))

    def head(self, x: ir.Value, time: ir.Value, latents: ir.Value) -> ir.Value:
        """``[L, D] → [1, z, T, h, w]``; uses the time embedding before SiLU, and unpatches channel fastest."""
        g, spec = self.g, self.spec
        with g.scope("head"):
            table = g.reshape(g.weight("head.modulation", (1, 2, spec.width), FLOAT), [1, -1])
            shift, scale = (g.add(part, time) for part in g.split(table, 2, 1))
            features = PATCH[1] * PATCH[2] * spec.out_channels
            y = self.linear(self.modulated(x, shift, scale), "head.head", (spec.width, features), FLOAT)
            patches = g.concat([self.grid, g.constant([PATCH[1], PATCH[2], spec.out_channels])], 0)
            y = g.transpose(g.op("Reshape", y, patches), 5, 0, 1, 3, 2, 4)
            return g.op("Reshape", y, g.op("Shape", latents))
