"""Latents to frames: the VAE's decoder as two graphs, one for the first latent frame and one for every later frame.

A latent frame becomes four frames, the first only one: its time convolutions are skipped and their caches are zero
(wan22.md §4.4). Pixels are doubled by concatenating a value with itself: TensorRT fuses this with the surrounding
reshapes into one copy kernel, while Resize stays separate; on a CPU it is ten times as fast as Expand.
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
    merge_pixels,
    middle,
    residual_block,
    stage_graph,
    take_edge,
    unsupported_shortcut,
)
from wan22.parts import VaeSpec
from wan22.strips import VaeStage


def vae_decoder(
    spec: VaeSpec, first: bool, compute: ir.DataType = FLOAT, size: LatentSize | None = None
) -> GraphBuilder:
    """The graph from one latent frame to one (``first``) or four frames.

    Inputs: ``latents`` [1, z, 1, h, w] as the sampler returns them and, unless ``first``, ``cache_00`` ...
    ``cache_31``. Outputs: ``frames`` [1, 3, 1 or 4, H, W] in [-1, 1] and ``next_cache_00`` ... ``next_cache_31``. All
    are float32, or float16 for caches if ``compute`` is; dynamic sides are named by :meth:`VaeGraph.video`, fixed ones
    follow ``size`` (latent rows, columns).
    """
    g = VaeGraph(f"vae_decoder_{'first' if first else 'next'}", spec, first=first, compute=compute, size=size)
    latents = g.input("latents", FLOAT, g.video(spec.latent_channels, 1, 1))
    g.take_caches(spec.decoder_caches)
    x, shortcut, frames = _motion(g, _features(g, latents))
    x = _fine(g, *_coarse(g, x, shortcut, frames), frames)
    g.output("frames", x, g.video(3, frames, spec.spatial_stride))
    g.give_caches(spec.decoder_caches)
    return g


def decoder_stage(spec: VaeSpec, stage: VaeStage, first: bool, compute: ir.DataType = FLOAT) -> GraphBuilder:
    """One of the graphs that :func:`vae_decoder` is cut into; only "motion" differs if ``first``.

    ``latents`` → middle → ``features`` [1, C, 1, h, w], float32 → motion → ``pictures`` [1, C, 1 or 4, 2h, 2w] → coarse
    → ``details`` [1, C, 1, 4h, 4w] → fine → ``frames`` [1, 3, 1, H, W]. Each cut is before rows and columns double, and
    what a stage's shortcut adds is in further channels. A graph gives ``next_pictures`` and ``next_details``, as the
    prefix keeps them on the device.
    """
    g, caches = stage_graph(spec, "vae_decoder", stage, first, compute)
    if stage == "middle":
        latents = g.input("latents", FLOAT, g.video(spec.latent_channels, 1, 1))
        g.take_caches(caches)
        g.output("features", g.cast(_features(g, latents), FLOAT), g.video(spec.decoder_widths[0], 1, 1))
    elif stage == "motion":
        features = g.input("features", FLOAT, g.video(spec.decoder_widths[0], 1, 1))
        g.take_caches(caches)
        give_edge(g, "pictures", *_motion(g, g.cast(features, g.compute)))
    elif stage == "coarse":
        pictures = take_edge(g, "pictures", 1)
        g.take_caches(caches)
        give_edge(g, "details", *_coarse(g, *pictures, 1), 1)
    else:
        details = take_edge(g, "details", 1)
        g.take_caches(caches)
        g.output("frames", _fine(g, *details, 1), g.video(3, 1, spec.spatial_stride))
    g.give_caches(caches)
    return g


def _features(g: VaeGraph, latents: ir.Value) -> ir.Value:
    """``[1, z, 1, h, w]`` → ``[1, C, 1, h, w]``: all that looks at the whole picture."""
    mean, inverse_std = latent_statistics(g)
    x = g.add(g.op("Div", latents, inverse_std), mean)
    with g.scope("conv2"):
        x = conv(g, g.cast(x, g.compute))
    with g.scope("decoder"):
        with g.scope("conv1"):
            x = causal_conv(g, x)
        return middle(g, x, g.spec.decoder_widths[0])


def _motion(g: VaeGraph, x: ir.Value) -> tuple[ir.Value, ir.Value | None, int]:
    """The stages that double frames: ``[1, C, 1, h, w]`` → ``[1, C, F, 2h, 2w]``, what its shortcut adds, and F.

    The last of them ends before it doubles rows and columns.
    """
    frames, last = 1, g.spec.last_in_time
    with g.scope("decoder"):
        for stage in range(last + 1):
            x, shortcut, frames = _double_frames(g, _blocks(g, x, stage), x, stage, frames)
            if stage < last:
                x = _double_sides(g, x, shortcut, stage, frames)
    return x, shortcut, frames


def _coarse(g: VaeGraph, x: ir.Value, shortcut: ir.Value | None, frames: int) -> tuple[ir.Value, ir.Value | None]:
    """The stages before the last: ``[1, C, F, 2h, 2w]`` → ``[1, C, F, 4h, 4w]`` and what its shortcut adds."""
    spec = g.spec
    with g.scope("decoder"):
        for stage in range(spec.last_in_time + 1, len(spec.temporal_down)):
            entering = _double_sides(g, x, shortcut, stage - 1, frames)
            x, shortcut = _blocks(g, entering, stage), entering if spec.residual else None
    return x, shortcut


def _fine(g: VaeGraph, x: ir.Value, shortcut: ir.Value | None, frames: int) -> ir.Value:
    """The last stage and the head: ``[1, C, F, 4h, 4w]`` → ``[1, 3, F, H, W]`` in [-1, 1]."""
    widths, spec, last = g.spec.decoder_widths, g.spec, len(g.spec.temporal_down)
    with g.scope("decoder"):
        x = _blocks(g, _double_sides(g, x, shortcut, last - 1, frames), last)
        x = head(g, x, widths[-1])
    if spec.patch > 1:  # [1, 12, F, h, w] → [1, 3, F, 2h, 2w]; the column is the slower index of a colour's channels
        x = g.reshape(g.op("Unsqueeze", x, g.constant([0])), [3, 2, 2, frames, 0, 0])
        x = merge_pixels(g, g.transpose(x, 0, 3, 4, 2, 5, 1), 3, frames)
    return g.op("Clip", g.cast(x, FLOAT), g.constant(-1.0, FLOAT), g.constant(1.0, FLOAT))


def _blocks(g: VaeGraph, x: ir.Value, stage: int) -> ir.Value:
    """The residual blocks of a stage."""
    spec = g.spec
    widths = spec.decoder_stage_input(stage), spec.decoder_widths[stage + 1]
    for index in range(spec.blocks_per_stage + 1):
        with g.scope(vae_module("upsamples", spec, stage, index)):
            x = residual_block(g, x, widths[min(index, 1)], widths[1])
    return x


def _double_frames(
    g: VaeGraph, x: ir.Value, entering: ir.Value, stage: int, frames: int
) -> tuple[ir.Value, ir.Value | None, int]:
    """Double the frames of a stage's blocks ``x`` and of what its shortcut adds, which is made of ``entering``.

    A video's first frame is neither doubled nor remembered. Two frames come from the lower and the upper half of the
    time convolution's channels.
    """
    spec, width = g.spec, g.spec.decoder_widths[stage + 1]
    with g.scope(vae_module("upsamples", spec, stage, spec.blocks_per_stage + 1)), g.scope("time_conv"):
        if g.first:
            shape = g.concat([g.constant([1, width, 2]), g.op("Shape", x, start=3, end=5)], 0)
            g.remember(g.op("Expand", g.constant(0.0, FLOAT), shape))
            return x, entering if spec.residual else None, frames
        halves = g.reshape(causal_conv(g, x), [2, width, frames, 0, 0])
        x = g.reshape(g.transpose(halves, 1, 2, 0, 3, 4), [1, width, 2 * frames, 0, 0])
    if not spec.residual:
        return x, None, 2 * frames
    before = spec.decoder_stage_input(stage)
    with g.scope(f"upsamples.{stage}.avg_shortcut"):
        twice = g.op("Expand", g.reshape(entering, [before, frames, 1, 0, 0]), g.constant([1, 1, 2, 1, 1]))
        return x, g.reshape(twice, [1, before, 2 * frames, 0, 0]), 2 * frames


def _double_sides(g: VaeGraph, x: ir.Value, shortcut: ir.Value | None, stage: int, frames: int) -> ir.Value:
    """Double rows and columns, and add those of the ``shortcut`` around a stage of VAE 2.2 (DupUp3D, §4.1)."""
    spec, entering, leaving = g.spec, g.spec.decoder_stage_input(stage), g.spec.decoder_widths[stage + 1]
    in_time = spec.temporal_down[::-1][stage]
    with g.scope(vae_module("upsamples", spec, stage, spec.blocks_per_stage + 1)):
        x = _enlarge(g, x, leaving, frames)
        with g.scope("resample.1"):
            x = conv(g, x)
    if shortcut is None:
        return x
    if entering not in (leaving, *([] if in_time else [2 * leaving, 4 * leaving])):
        raise unsupported_shortcut(entering, leaving)
    with g.scope(f"upsamples.{stage}.avg_shortcut"):
        return g.add(x, _enlarge(g, shortcut, leaving, frames, sources=entering // leaving))


def _enlarge(g: VaeGraph, x: ir.Value, width: int, frames: int, sources: int = 1) -> ir.Value:
    """``[1, sources·width, F, h, w]`` → ``[1, width, F, 2h, 2w]``.

    One source channel fills all 2×2 pixels; two fill the upper and the lower row; four fill a pixel each, row by row.
    """
    if sources == 1:
        x = g.reshape(x, [width, frames, -1, 1, 0, 1])
        x = g.concat([x, x], 3)
    else:
        parts = [width, 2, sources // 2, frames, 0, 0]
        x = g.transpose(g.reshape(g.op("Unsqueeze", x, g.constant([0])), parts), 0, 3, 4, 1, 5, 2)
    if sources < 4:
        x = g.concat([x, x], 5)
    return merge_pixels(g, x, width, frames)
