"""Frames to latents: the VAE's encoder as two graphs, one for a video's first frame and one for every next four.

The latents are the normalised mean of the posterior (wan22.md §4.3). The first frame is a separate chunk: the time
convolutions are skipped and only remember it (§4.4).
"""

import onnx_ir as ir

from export.checkpoint.schema import vae_module
from export.graphs.builder import FLOAT, GraphBuilder
from export.graphs.vae_blocks import (
    LatentSize,
    VaeGraph,
    causal_conv,
    conv,
    head,
    latent_statistics,
    middle,
    prepend_cache,
    prepend_zeros,
    residual_block,
    split_pixels,
    unsupported_shortcut,
)
from wan22.parts import VaeSpec


def vae_encoder(
    spec: VaeSpec, first: bool, compute: ir.DataType = FLOAT, size: LatentSize | None = None
) -> GraphBuilder:
    """The graph from one (``first``) or four frames to one latent frame.

    Inputs: ``frames`` [1, 3, 1 or 4, H, W] in [-1, 1] and, unless ``first``, ``cache_00`` ... ``cache_23``. Outputs:
    ``latents`` [1, z, 1, h, w], normalised for the sampler, and ``next_cache_00`` ... ``next_cache_23``. All are
    float32, or float16 for caches if ``compute`` is; dynamic sides are named by :meth:`VaeGraph.video`, fixed ones
    follow ``size`` (latent rows, columns).
    """
    g = VaeGraph("vae_encoder", spec, first=first, compute=compute, size=size)
    frames = 1 if first else spec.temporal_stride
    x = g.input("frames", FLOAT, g.video(3, frames, spec.spatial_stride))
    g.take_caches(spec.encoder_caches)
    if spec.patch > 1:  # [1, 3, F, 2h, 2w] → [1, 12, F, h, w]; the column is the slower index of a colour's channels
        x = g.transpose(split_pixels(g, x, 3, frames), 0, 5, 3, 1, 2, 4)
        x = g.op("Squeeze", g.reshape(x, [1, 1, 12, frames, 0, 0]), g.constant([0]))
    with g.scope("encoder"):
        x = _encoder(g, g.cast(x, g.compute), frames)
    with g.scope("conv1"):
        mean_and_variance = conv(g, x)
    x = g.cast(g.slice(mean_and_variance, 1, 0, spec.latent_channels), FLOAT)
    mean, inverse_std = latent_statistics(g)
    latents = g.mul(g.op("Sub", x, mean), inverse_std)
    g.output("latents", latents, g.video(spec.latent_channels, 1, 1))
    g.give_caches(spec.encoder_caches)
    return g


def _encoder(g: VaeGraph, x: ir.Value, frames: int) -> ir.Value:
    """``[1, 3·patch², F, 8h, 8w]`` → ``[1, 2z, 1, h, w]``."""
    widths = g.spec.encoder_widths
    with g.scope("conv1"):
        x = causal_conv(g, x)
    for stage in range(len(widths) - 1):
        x, frames = _stage(g, x, stage, frames)
    return head(g, middle(g, x, widths[-1]), widths[-1])


def _stage(g: VaeGraph, x: ir.Value, stage: int, frames: int) -> tuple[ir.Value, int]:
    """Residual blocks; every stage but the last then halves rows and columns, and some also the frames."""
    spec, entering, leaving_frames = g.spec, x, frames
    widths = spec.encoder_widths[stage : stage + 2]
    for index in range(spec.blocks_per_stage):
        with g.scope(vae_module("downsamples", spec, stage, index)):
            x = residual_block(g, x, widths[min(index, 1)], widths[1])
    halving = stage < len(spec.temporal_down)
    if halving:
        with g.scope(vae_module("downsamples", spec, stage, spec.blocks_per_stage)):
            x, leaving_frames = _downsample(g, x, frames)
    if spec.residual:
        with g.scope(f"downsamples.{stage}.avg_shortcut"):
            x = g.add(x, _average(g, entering, stage, frames) if halving else entering)
    return x, leaving_frames


def _downsample(g: VaeGraph, x: ir.Value, frames: int) -> tuple[ir.Value, int]:
    """Keep every second row and column, with zeros beyond the lower and right edge; then every second frame."""
    with g.scope("resample.1"):
        x = conv(g, x, strides=(1, 2, 2), pads=(0, 0, 1, 1))
    if not g.has("time_conv"):
        return x, frames
    with g.scope("time_conv"):
        if g.first:
            g.remember(x)
            return x, frames
        return conv(g, prepend_cache(g, x, kept=1), strides=(2, 1, 1)), frames // 2


def _average(g: VaeGraph, x: ir.Value, stage: int, frames: int) -> ir.Value:
    """The shortcut around a stage of VAE 2.2 (AvgDown3D, §4.1): average 2×2 pixels, stack pairs of frames as channels.

    The first frame of a video forms a pair with a preceding zero frame.
    """
    (width, leaving), in_time = g.spec.encoder_widths[stage : stage + 2], g.spec.temporal_down[stage]
    if leaving != (2 * width if in_time else width):
        raise unsupported_shortcut(width, leaving)
    if in_time and g.first:
        x, frames = prepend_zeros(g, x), 2
    x = g.op("AveragePool", x, kernel_shape=[1, 2, 2], strides=[1, 2, 2])
    if not in_time:
        return x
    pairs = g.transpose(g.reshape(x, [width, frames // 2, 2, 0, 0]), 0, 2, 1, 3, 4)
    return g.reshape(pairs, [1, 2 * width, frames // 2, 0, 0])
