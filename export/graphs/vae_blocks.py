"""Building blocks of the VAE's encoder and decoder graphs (wan22.md §4.1, §4.4, §4.5).

A video inside a graph is a five-dimensional value ``[1, channels, frames, rows, columns]`` with known channels and
frames; rows and columns may be dynamic. Except in attention, reshapes need no run-time sizes: ``0`` copies an axis and
one ``-1`` is inferred, so a dynamic graph has the same nodes as a static one. For this, an axis moves to where ``0``
copies it before its neighbours are merged. 2-D convolutions run as 3-D ones with a one-frame kernel, so frames never
move to the batch axis.

Scopes are module paths: inside ``scope("decoder")`` and ``scope("conv1")`` the parameter ``weight`` is
``decoder.conv1.weight``, with the checkpoint's shape.

Each half also exists as four graphs (:data:`wan22.strips.VAE_STAGES`): "middle" sees whole pictures, because it
attends; the others take strips of them, and all but "motion" one frame per call.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.checkpoint.schema import vae_tensors
from export.graphs.builder import FLOAT, FLOAT16, GraphBuilder
from wan22.errors import UserError
from wan22.parts import Cache, VaeSpec
from wan22.strips import SIDES, Edge, Half, VaeStage, caches_of, edge_channels, edge_scale, half_of

LatentSize = tuple[int, int]  # rows and columns of the latent grid
WHOLE, STRIP = ("height", "width"), SIDES  # names of dynamic sides
NORM_EPS = 1e-12
_END = 2**31 - 1


class VaeGraph(GraphBuilder):
    """The graph of one chunk with its caches.

    A ``first`` graph is for a video's first chunk: one frame, no history, hence no cache inputs. A ``single`` graph
    takes one frame per call, whether it is the first or not: the two frames that a convolution remembers are separate
    inputs, ``recent_05`` and the one before it, ``cache_05``, which ``next_cache_05`` replaces. So a call writes one
    frame and keeps the other where it is. Both are zeros at first, which is the padding of the first frame.

    Convolutions and the values between them have type ``compute``; inputs, outputs, channel norms, SiLU and softmax are
    float32. Caches hold inputs of convolutions, so float16 graphs lose nothing by float16 caches; numpy has no bfloat16
    for those of others.
    """

    def __init__(
        self,
        name: str,
        spec: VaeSpec,
        *,
        first: bool = False,
        single: bool = False,
        compute: ir.DataType,
        size: LatentSize | None = None,
        start: int = 0,
    ) -> None:
        super().__init__(name)
        self.spec, self.first, self.single, self.compute, self.size = spec, first, single, compute, size
        self.cached = FLOAT16 if compute == FLOAT16 else FLOAT
        self.sides, self._shapes = WHOLE, vae_tensors(spec)
        self._start = start  # number of the first cache: stages number theirs like the whole graph
        self._entering: list[list[ir.Value]] = []
        self._leaving: list[ir.Value] = []

    # -- edges

    def video(self, channels: int, frames: int, scale: int) -> list[int | str]:
        """The dimensions of a video ``scale`` times as large as the latent grid.

        Dynamic sides are named "height" and "width" at scale 1, otherwise "K*height" and "K*width": K times the latent
        dimension. Those of strips are "strip_height" and "strip_width".
        """
        if self.size is not None:
            return [1, channels, frames, *(side * scale for side in self.size)]
        return [1, channels, frames, *(side if scale == 1 else f"{scale}*{side}" for side in self.sides)]

    def take_caches(self, caches: Sequence[Cache]) -> None:
        """Declare ``cache_00``, ``cache_01``, ..., which :meth:`recall` returns in this order."""
        for index, cache in enumerate(() if self.first else caches, self._start):
            dims = self.video(cache.channels, self._kept(cache), cache.scale)
            names = ("cache", "recent") if self.single else ("cache",)
            self._entering.append([self.input(f"{name}_{index:02d}", self.cached, dims) for name in names])

    def _kept(self, cache: Cache) -> int:
        """The frames in one tensor of ``cache``."""
        return 1 if self.single else cache.frames

    def recall(self) -> list[ir.Value]:
        """The frames that the current convolution kept from earlier chunks, in their order."""
        return [self.cast(value, self.compute) for value in self._entering[len(self._leaving)]]

    def remember(self, frames: ir.Value) -> None:
        """Keep ``frames`` for the next chunk."""
        self._leaving.append(frames)

    def give_caches(self, caches: Sequence[Cache]) -> None:
        """Declare ``next_cache_00``, ..., one for each remembered value."""
        with self.scope("caches"):
            for index, (cache, value) in enumerate(zip(caches, self._leaving, strict=True), self._start):
                dims = self.video(cache.channels, self._kept(cache), cache.scale)
                self.output(f"next_cache_{index:02d}", self.cast(value, self.cached), dims, self.cached)

    # -- parameters

    def parameter(self, leaf: str, dtype: ir.DataType) -> ir.Value:
        """The parameter ``leaf`` of the module in scope."""
        key = ".".join([*self._scope, leaf])
        return self.weight(key, self._shapes[key], dtype)

    def has(self, module: str) -> bool:
        """True if the module in scope has a convolution named ``module``."""
        return ".".join([*self._scope, module, "weight"]) in self._shapes


def latent_statistics(g: VaeGraph) -> tuple[ir.Value, ir.Value]:
    """Mean and 1/std of the latents ``[1, z, 1, 1, 1]``; the reciprocal is rounded once, as officially (§4.3)."""
    shape = (1, g.spec.latent_channels, 1, 1, 1)
    inverse_std = (1 / np.array(g.spec.latents_std, np.float32)).reshape(shape)
    return g.constant(np.array(g.spec.latents_mean, np.float32).reshape(shape), FLOAT), g.constant(inverse_std, FLOAT)


# -- stages


def stage_graph(
    spec: VaeSpec, half: Half, stage: VaeStage, first: bool, compute: ir.DataType
) -> tuple[VaeGraph, tuple[Cache, ...]]:
    """An empty graph of a stage, and its caches."""
    start, caches = caches_of(spec, half, stage)
    in_time = stage == "motion"
    name = f"{half}_{stage}" + (f"_{'first' if first else 'next'}" if in_time else "")
    g = VaeGraph(name, spec, first=first and in_time, single=not in_time, compute=compute, start=start)
    if stage != "middle":
        g.sides = STRIP
    return g, caches


def take_edge(g: VaeGraph, name: Edge, frames: int) -> tuple[ir.Value, ir.Value | None]:
    """Declare the input ``name`` from the stage before: a picture, and what a shortcut adds to the next one."""
    (width, beside), scale = edge_channels(g.spec, half_of(str(g.graph.name)), name), edge_scale(name)
    joined = g.cast(g.input(name, g.cached, g.video(width + beside, frames, scale)), g.compute)
    if not beside:
        return joined, None
    return g.slice(joined, 1, 0, width), g.slice(joined, 1, width, width + beside)


def give_edge(g: VaeGraph, name: Edge, x: ir.Value, shortcut: ir.Value | None, frames: int) -> None:
    """Declare the output that :func:`take_edge` takes in the next stage."""
    channels, scale = sum(edge_channels(g.spec, half_of(str(g.graph.name)), name)), edge_scale(name)
    joined = g.cast(x if shortcut is None else g.concat([x, shortcut], 1), g.cached)
    g.output(f"next_{name}", joined, g.video(channels, frames, scale), g.cached)


# -- convolutions


def conv(
    g: VaeGraph, x: ir.Value, *, strides: Sequence[int] = (1, 1, 1), pads: Sequence[int] | None = None
) -> ir.Value:
    """The convolution in scope, without padding in time; default ``pads`` (top, left, bottom, right) keep the size."""
    weight, bias = g.parameter("weight", g.compute), g.parameter("bias", g.compute)
    kernel = list((weight.shape or ir.Shape([])).numpy())[2:]
    if len(kernel) == 2:
        weight, kernel = g.op("Unsqueeze", weight, g.constant([2])), [1, *kernel]
    elif g.first and kernel[0] > 1:  # zeros precede the first frame, so only the last tap reads a frame
        weight, kernel = g.slice(weight, 2, kernel[0] - 1, kernel[0]), [1, *kernel[1:]]
    top, left, bottom, right = pads or [n // 2 for n in kernel[1:]] * 2
    pads = [0, top, left, 0, bottom, right]
    return g.op("Conv", x, weight, bias, kernel_shape=kernel, strides=strides, pads=pads)


def causal_conv(g: VaeGraph, x: ir.Value) -> ir.Value:
    """A convolution over the current and two past frames; its cache is the last two frames of its input."""
    if g.first:
        g.remember(prepend_zeros(g, x))
        return conv(g, x)
    return conv(g, prepend_cache(g, x, kept=1 if g.single else 2))


def prepend_cache(g: VaeGraph, x: ir.Value, *, kept: int) -> ir.Value:
    """The cached frames followed by ``x``; the last ``kept`` frames of both become the next cache."""
    joined = g.concat([*g.recall(), x], 2)
    g.remember(g.slice(joined, 2, -kept, _END))
    return joined


def prepend_zeros(g: VaeGraph, x: ir.Value) -> ir.Value:
    """One frame of zeros followed by ``x``."""
    return g.op("Pad", x, g.constant([0, 0, 1, 0, 0] + [0] * 5))


# -- modules


def norm(g: VaeGraph, x: ir.Value, width: int) -> ir.Value:
    """``x / max(|x|, 1e-12) · sqrt(width) · gamma`` over the channels of each position, in float32 throughout."""
    x = g.cast(x, FLOAT)
    gamma = g.parameter("gamma", FLOAT)
    gamma = g.reshape(g.mul(gamma, g.constant(width**0.5, FLOAT)), [1, width, 1, 1, 1])
    length = g.op("Sqrt", g.op("ReduceSum", g.mul(x, x), g.constant([1]), keepdims=1))
    return g.mul(g.op("Div", x, g.op("Max", length, g.constant(NORM_EPS, FLOAT))), gamma)


def activation(g: VaeGraph, x: ir.Value, width: int) -> ir.Value:
    """Channel norm, then SiLU. Precedes every convolution over three frames except the first."""
    return g.cast(g.silu(norm(g, x, width)), g.compute)


def residual_block(g: VaeGraph, x: ir.Value, entering: int, leaving: int) -> ir.Value:
    """``[1, entering, F, h, w]`` → ``[1, leaving, F, h, w]``; two caches."""
    y = x
    for (normed, convolved), width in zip((("0", "2"), ("3", "6")), (entering, leaving), strict=True):
        with g.scope(f"residual.{normed}"):
            y = activation(g, y, width)
        with g.scope(f"residual.{convolved}"):
            y = causal_conv(g, y)
    if g.has("shortcut"):
        with g.scope("shortcut"):
            x = conv(g, x)
    return g.add(x, y)


def attention(g: VaeGraph, x: ir.Value, width: int) -> ir.Value:
    """Single-head self-attention over the positions of the chunk's one latent frame ``[1, width, 1, h, w]``.

    Written as MatMul, Softmax, MatMul: TensorRT has no fused kernel for heads this wide or for float32.
    """
    with g.scope("norm"):
        y = g.cast(norm(g, x, width), g.compute)
    with g.scope("to_qkv"):
        y = g.reshape(conv(g, y), [1, 3 * width, -1])
    q, k, v = g.split(g.transpose(y, 0, 2, 1), 3, axis=2)
    q = g.mul(q, g.constant(width**-0.5, g.compute))  # scale q first, so that fp16 cannot overflow
    scores = g.cast(g.op("MatMul", q, g.transpose(k, 0, 2, 1)), FLOAT)
    weights = g.cast(g.op("Softmax", scores, axis=-1), g.compute)
    y = g.transpose(g.op("MatMul", weights, v), 0, 2, 1)
    y = g.op("Reshape", y, g.op("Shape", x))
    with g.scope("proj"):
        return g.add(x, conv(g, y))


def middle(g: VaeGraph, x: ir.Value, width: int) -> ir.Value:
    with g.scope("middle.0"):
        x = residual_block(g, x, width, width)
    with g.scope("middle.1"):
        x = attention(g, x, width)
    with g.scope("middle.2"):
        return residual_block(g, x, width, width)


def head(g: VaeGraph, x: ir.Value, width: int) -> ir.Value:
    with g.scope("head.0"):
        x = activation(g, x, width)
    with g.scope("head.2"):
        return causal_conv(g, x)


def unsupported_shortcut(entering: int, leaving: int) -> UserError:
    """The error for widths of no published VAE 2.2, for which the parameter-free shortcuts would mix channels."""
    found = f"a VAE stage of {entering} to {leaving} channels"
    return UserError(found, "channel multipliers 1, 2, 4, 4", "use a published VAE 2.2")


# -- pixels


def split_pixels(g: VaeGraph, x: ir.Value, channels: int, frames: int) -> ir.Value:
    """``[1, C, F, 2h, 2w]`` → ``[C, F, h, 2, w, 2]``."""
    return g.reshape(g.reshape(x, [0, 0, 0, 0, -1, 2]), [channels, frames, -1, 2, 0, 2])


def merge_pixels(g: VaeGraph, x: ir.Value, channels: int, frames: int) -> ir.Value:
    """``[C, F, h, 2, w, 2]`` → ``[1, C, F, 2h, 2w]``."""
    return g.reshape(g.reshape(x, [0, 0, 0, 0, -1]), [1, channels, frames, -1, 0])
