"""The diffusion transformer (an expert) as an ONNX graph.

Tokens are rows of a ``[L, D]`` matrix throughout; the batch of one exists only at the edges and around attention. The
residual stream, normalisation, modulation, rotary embedding, time embedding and output head compute in float32, the
other matrix multiplications in the compute type, as in the official code under autocast. Sinusoid and rotary tables are
inputs, so the graph contains no position or timestep arithmetic.
"""

from dataclasses import dataclass

import onnx_ir as ir

from export.graphs.builder import FLOAT, GraphBuilder
from export.graphs.dit_block import Blocks, Modulation, Tables
from export.graphs.linear import Linears, Quantised
from wan22.parts import DitSpec
from wan22.specs import PATCH, TEXT_TOKENS


@dataclass(frozen=True)
class LatentDims:
    """Latent frames, rows and columns: numbers if the shapes are fixed, names if they are dynamic."""

    frames: int | str = "frames"
    height: int | str = "height"
    width: int | str = "width"

    @property
    def grid(self) -> tuple[int | str, int | str, int | str]:
        """Frames, rows and columns of tokens."""
        rows = self.height // PATCH[1] if isinstance(self.height, int) else "rows"
        columns = self.width // PATCH[2] if isinstance(self.width, int) else "columns"
        return self.frames, rows, columns


def dit_graph(
    spec: DitSpec, compute: ir.DataType = FLOAT, dims: LatentDims | None = None, quantised: Quantised | None = None
) -> GraphBuilder:
    """The graph of one expert, which predicts the velocity of ``latents`` at a timestep.

    Inputs, all float32: ``latents`` [1, z, T, h, w]; ``condition`` [1, c, T, h, w] if the model has one;
    ``time_features`` [rows, 256]; ``text`` [1, 512, text width]; ``rope_cos``, ``rope_sin`` [T, h/2, w/2, head/2].
    Output: ``velocity`` [1, z, T, h, w] float32, an estimate of noise minus clean latents.

    Matrix multiplications run in ``compute``, those of ``quantised`` in its types. Weights keep their official names;
    quantised, ``self_attn.qkv`` and ``cross_attn.kv`` are each one matrix, and every matrix has a ``weight_scale``.
    """
    dims = dims or LatentDims()
    g = GraphBuilder("dit")
    video = (dims.frames, dims.height, dims.width)
    latents = g.input("latents", FLOAT, [1, spec.out_channels, *video])
    entering = [latents]
    if spec.condition_channels:
        entering.append(g.input("condition", FLOAT, [1, spec.condition_channels, *video]))
    time_features = g.input("time_features", FLOAT, [spec.time_rows, spec.freq_width])
    text = g.input("text", FLOAT, [1, TEXT_TOKENS, spec.text_width])
    rope_cos, rope_sin = (g.input(f"rope_{f}", FLOAT, [*dims.grid, spec.head_width // 2]) for f in ("cos", "sin"))

    linears = Linears(g, compute, quantised)
    modulated = Modulation(g, spec, _tables(g, spec, rope_cos, rope_sin))
    writer, block = Ends(spec, linears, modulated), Blocks(spec, linears, modulated)
    x = writer.patch_embedding(g.concat(entering, 1) if len(entering) > 1 else latents)
    time, modulation = writer.time_embedding(time_features)
    context = writer.text_embedding(text)
    for index in range(spec.layers):
        with g.scope(f"blocks.{index}"):
            x = block(f"blocks.{index}", x, modulation, context)
    g.output("velocity", writer.head(x, time, latents, rope_cos), [1, spec.out_channels, *video])
    return g


def _tables(g: GraphBuilder, spec: DitSpec, rope_cos: ir.Value, rope_sin: ir.Value) -> Tables:
    with g.scope("shapes"):
        cos, sin = (g.reshape(table, [-1, 1, 1, spec.head_width // 2, 1]) for table in (rope_cos, rope_sin))
        return Tables(cos, sin, _first_frame(g, rope_cos) if spec.time_rows > 1 else None)


def _first_frame(g: GraphBuilder, rope_cos: ir.Value) -> ir.Value:
    """``[L, 1]`` float32: 1 for the tokens of the first latent frame, else 0.

    It takes its shape from a column of the table times zero: compilers fuse that, but not a shape made at run time.
    """
    frames = g.op("Squeeze", g.op("Shape", rope_cos, start=0, end=1))
    numbers = g.cast(g.op("Range", g.constant(0), frames, g.constant(1)), FLOAT)
    one = g.constant(1.0, FLOAT)
    first = g.reshape(g.op("Sub", one, g.op("Min", numbers, one)), [-1, 1, 1, 1])
    zeros = g.mul(g.slice(rope_cos, 3, 0, 1), g.constant(0.0, FLOAT))
    return g.reshape(g.add(zeros, first), [-1, 1])


class Ends:
    """The modules before and after the blocks, named as in the official code."""

    def __init__(self, spec: DitSpec, linears: Linears, modulated: Modulation) -> None:
        self.g, self.spec, self.linears, self.modulated = linears.g, spec, linears, modulated

    def linear(self, x: ir.Value, key: str, width: tuple[int, int], dtype: ir.DataType) -> ir.Value:
        """``x [rows, in] → [rows, out]`` in ``dtype``; ``width`` is (in, out)."""
        g, (entering, leaving) = self.g, width
        with g.scope(key.rsplit(".", 1)[-1]):
            weight = g.weight(f"{key}.weight", (leaving, entering), dtype)
            return g.op("Gemm", g.cast(x, dtype), weight, g.weight(f"{key}.bias", (leaving,), dtype), transB=1)

    def patch_embedding(self, video: ir.Value) -> ir.Value:
        """``[1, C, T, h, w] → [L, D]`` float32, tokens ordered frame, row, column."""
        g, spec = self.g, self.spec
        with g.scope("patch_embedding"):
            weight = g.weight("patch_embedding.weight", (spec.width, spec.in_channels, *PATCH), self.linears.compute)
            bias = g.weight("patch_embedding.bias", (spec.width,), self.linears.compute)
            x = g.op("Conv", g.cast(video, self.linears.compute), weight, bias, strides=PATCH, kernel_shape=PATCH)
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
        """``[1, 512, text width] → [512, D]``; zero rows become a constant row that attention includes."""
        context = self.project_text(text)
        numbers = {self.linears.number(f"blocks.{block}.cross_attn.k") for block in range(self.spec.layers)}
        with self.g.scope("text_embedding"):
            for number in sorted(number for number in numbers if number is not None):
                self.linears.per_token(context, number)  # quantise once here, because every block reads it
        return context

    def project_text(self, text: ir.Value) -> ir.Value:
        g, spec, compute = self.g, self.spec, self.linears.compute
        with g.scope("text_embedding"):
            x = g.reshape(text, [-1, spec.text_width])
            x = self.linear(x, "text_embedding.0", (spec.text_width, spec.width), compute)
            x = g.op("Gelu", x, approximate="tanh")
            return self.linear(x, "text_embedding.2", (spec.width, spec.width), compute)

    def head(self, x: ir.Value, time: ir.Value, latents: ir.Value, rope_cos: ir.Value) -> ir.Value:
        """``[L, D] → [1, z, T, h, w]``; uses the time embedding before SiLU and unpatches with channels fastest."""
        g, spec = self.g, self.spec
        with g.scope("head"):
            y = self.velocity_patches(x, time)
            patches = g.concat(
                [g.op("Shape", rope_cos, start=0, end=3), g.constant([PATCH[1], PATCH[2], spec.out_channels])], 0
            )
            y = g.transpose(g.op("Reshape", y, patches), 5, 0, 1, 3, 2, 4)
            return g.op("Reshape", y, g.op("Shape", latents))

    def velocity_patches(self, x: ir.Value, time: ir.Value) -> ir.Value:
        """``[L, D] → [L, 4·z]``, channels fastest."""
        g, spec = self.g, self.spec
        table = g.reshape(g.weight("head.modulation", (1, 2, spec.width), FLOAT), [1, -1])
        shift, scale = (g.add(part, time) for part in g.split(table, 2, 1))
        features = PATCH[1] * PATCH[2] * spec.out_channels
        return self.linear(self.modulated(x, shift, scale), "head.head", (spec.width, features), FLOAT)
