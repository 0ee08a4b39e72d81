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
    give_edge,
    head,
    latent_statistics,
    middle,
    prepend_cache,
    prepend_zeros,
    residual_block,
    split_pixels,
    stage_graph,
    take_edge,
    unsupported_shortcut,
)
from wan22.parts import VaeSpec
from wan22.strips import VaeStage


def vae_encoder(
    spec: VaeSpec, first: bool, compute: ir.DataType = FLOAT, size: LatentSize | None = None
) -> GraphBuilder:
    """The graph from one (``first``) or four frames to one latent frame.

    Inputs: ``frames`` [1, 3, 1 or 4, H, W] in [-1, 1] and, unless ``first``, ``cache_00`` ... ``cache_23``. Outputs:
    ``latents`` [1, z, 1, h, w], normalised for the sampler, and ``next_cache_00`` ... ``next_cache_23``. All are
    float32, or float16 for caches if ``compute`` is; dynamic sides are named by :meth:`VaeGraph.video`, fixed ones
    follow ``size`` (latent rows, columns).
    """
    g = VaeGraph(f"vae_encoder_{'first' if first else 'next'}", spec, first=first, compute=compute, size=size)
    frames = 1 if first else spec.temporal_stride
    x = g.input("frames", FLOAT, g.video(3, frames, spec.spatial_stride))
    g.take_caches(spec.encoder_caches)
    pictures = _halve_sides(g, _fine(g, x, frames), spec.first_in_time)
    g.output("latents", _latents(g, _motion(g, *pictures, frames)), g.video(spec.latent_channels, 1, 1))
    g.give_caches(spec.encoder_caches)
    return g


def encoder_stage(spec: VaeSpec, stage: VaeStage, first: bool, compute: ir.DataType = FLOAT) -> GraphBuilder:
    """One of the graphs that :func:`vae_encoder` is cut into; only "motion" differs if ``first``.

    ``frames`` [1, 3, 1, H, W] → fine → ``details`` [1, C, 1, 4h, 4w] → coarse → ``pictures`` [1, C, 1 or 4, 2h, 2w] →
    motion → ``features`` [1, C, 1, h, w], float32 → middle → ``latents``. See
    :func:`export.graphs.vae_decoder.decoder_stage`.
    """
    g, caches = stage_graph(spec, "vae_encoder", stage, first, compute)
    if stage == "fine":
        frames = g.input("frames", FLOAT, g.video(3, 1, spec.spatial_stride))
        g.take_caches(caches)
        give_edge(g, "details", _fine(g, frames, 1), None, 1)
    elif stage == "coarse":
        details, _ = take_edge(g, "details", 1)
        g.take_caches(caches)
        give_edge(g, "pictures", *_halve_sides(g, details, spec.first_in_time), 1)
    elif stage == "motion":
        count = 1 if first else spec.temporal_stride
        pictures = take_edge(g, "pictures", count)
        g.take_caches(caches)
        g.output("features", g.cast(_motion(g, *pictures, count), FLOAT), g.video(spec.encoder_widths[-1], 1, 1))
    else:
        features = g.input("features", FLOAT, g.video(spec.encoder_widths[-1], 1, 1))
        g.take_caches(caches)
        g.output("latents", _latents(g, g.cast(features, g.compute)), g.video(spec.latent_channels, 1, 1))
    g.give_caches(caches)
    return g


def _fine(g: VaeGraph, x: ir.Value, frames: int) -> ir.Value:
    """The stages before the first that halves frames: ``[1, 3, F, H, W]`` → ``[1, C, F, 4h, 4w]``."""
    spec = g.spec
    if spec.patch > 1:  # [1, 3, F, 2h, 2w] → [1, 12, F, h, w]; the column is the slower index of a colour's channels
        x = g.transpose(split_pixels(g, x, 3, frames), 0, 5, 3, 1, 2, 4)
        x = g.op("Squeeze", g.reshape(x, [1, 1, 12, frames, 0, 0]), g.constant([0]))
    x = g.cast(x, g.compute)
    with g.scope("encoder"), g.scope("conv1"):
        x = causal_conv(g, x)
    for stage in range(spec.first_in_time):
        x, shortcut = _halve_sides(g, x, stage)
        x = x if shortcut is None else g.add(x, shortcut)
    return x


def _motion(g: VaeGraph, x: ir.Value, shortcut: ir.Value | None, frames: int) -> ir.Value:
    """The stages that halve frames, and the last: ``[1, C, F, 2h, 2w]`` → ``[1, C, 1, h, w]``."""
    spec, last = g.spec, len(g.spec.temporal_down)
    for stage in range(spec.first_in_time, last):
        if stage > spec.first_in_time:
            x, shortcut = _halve_sides(g, x, stage)
        x, frames = _halve_frames(g, x, shortcut, stage, frames)
    with g.scope("encoder"):
        entering, x = x, _blocks(g, x, last)
        if not spec.residual:
            return x
        with g.scope(f"downsamples.{last}.avg_shortcut"):
            return g.add(x, entering)


def _latents(g: VaeGraph, x: ir.Value) -> ir.Value:
    """``[1, C, 1, h, w]`` → ``[1, z, 1, h, w]``: all that looks at the whole picture."""
    width = g.spec.encoder_widths[-1]
    with g.scope("encoder"):
        x = head(g, middle(g, x, width), width)
    with g.scope("conv1"):
        mean_and_variance = conv(g, x)
    x = g.cast(g.slice(mean_and_variance, 1, 0, g.spec.latent_channels), FLOAT)
    mean, inverse_std = latent_statistics(g)
    return g.mul(g.op("Sub", x, mean), inverse_std)


def _blocks(g: VaeGraph, x: ir.Value, stage: int) -> ir.Value:
    """The residual blocks of a stage."""
    widths = g.spec.encoder_widths[stage : stage + 2]
    for index in range(g.spec.blocks_per_stage):
        with g.scope(vae_module("downsamples", g.spec, stage, index)):
            x = residual_block(g, x, widths[min(index, 1)], widths[1])
    return x


def _halve_sides(g: VaeGraph, entering: ir.Value, stage: int) -> tuple[ir.Value, ir.Value | None]:
    """The blocks of a stage, then every second row and column, with zeros beyond the lower and right edge.

    Beside it what the shortcut around a stage of VAE 2.2 adds (AvgDown3D, §4.1): the average of 2×2 pixels.
    """
    spec = g.spec
    (width, leaving), in_time = spec.encoder_widths[stage : stage + 2], spec.temporal_down[stage]
    if spec.residual and leaving != (2 * width if in_time else width):
        raise unsupported_shortcut(width, leaving)
    with g.scope("encoder"):
        x = _blocks(g, entering, stage)
        with g.scope(vae_module("downsamples", spec, stage, spec.blocks_per_stage)), g.scope("resample.1"):
            x = conv(g, x, strides=(1, 2, 2), pads=(0, 0, 1, 1))
        if not spec.residual:
            return x, None
        with g.scope(f"downsamples.{stage}.avg_shortcut"):
            return x, g.op("AveragePool", entering, kernel_shape=[1, 2, 2], strides=[1, 2, 2])


def _halve_frames(g: VaeGraph, x: ir.Value, shortcut: ir.Value | None, stage: int, frames: int) -> tuple[ir.Value, int]:
    """Every second frame, plus the ``shortcut`` with pairs of frames stacked as channels.

    The first frame of a video is kept, and forms a pair with a preceding zero frame in the shortcut.
    """
    width, leaving_frames = g.spec.encoder_widths[stage], frames if g.first else frames // 2
    module = vae_module("downsamples", g.spec, stage, g.spec.blocks_per_stage)
    with g.scope("encoder"), g.scope(module), g.scope("time_conv"):
        if g.first:
            g.remember(x)
        else:
            x = conv(g, prepend_cache(g, x, kept=1), strides=(2, 1, 1))
    if shortcut is None:
        return x, leaving_frames
    with g.scope("encoder"), g.scope(f"downsamples.{stage}.avg_shortcut"):
        if g.first:
            shortcut, frames = prepend_zeros(g, shortcut), 2
        pairs = g.transpose(g.reshape(shortcut, [width, frames // 2, 2, 0, 0]), 0, 2, 1, 3, 4)
        return g.add(x, g.reshape(pairs, [1, 2 * width, frames // 2, 0, 0])), leaving_frames
