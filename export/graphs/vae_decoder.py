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
    head,
    latent_statistics,
    merge_pixels,
    middle,
    residual_block,
    unsupported_shortcut,
)
from wan22.parts import VaeSpec


def vae_decoder(
    spec: VaeSpec, first: bool, compute: ir.DataType = FLOAT, size: LatentSize | None = None
) -> GraphBuilder:
    """The graph from one latent frame to one (``first``) or four frames.

    Inputs: ``latents`` [1, z, 1, h, w] as the sampler returns them and, unless ``first``, ``cache_00`` ...
    ``cache_31``. Outputs: ``frames`` [1, 3, 1 or 4, H, W] in [-1, 1] and ``next_cache_00`` ... ``next_cache_31``. All
    are float32, or float16 for caches if ``compute`` is; dynamic sides are named by :meth:`VaeGraph.video`, fixed ones
    follow ``size`` (latent rows, columns).
    """
    g = VaeGraph("vae_decoder", spec, first=first, compute=compute, size=size)
    latents = g.input("latents", FLOAT, g.video(spec.latent_channels, 1, 1))
    g.take_caches(spec.decoder_caches)
    mean, inverse_std = latent_statistics(g)
    x = g.add(g.op("Div", latents, inverse_std), mean)
    with g.scope("conv2"):
        x = conv(g, g.cast(x, g.compute))
    with g.scope("decoder"):
        x, frames = _decoder(g, x)
    if spec.patch > 1:  # [1, 12, F, h, w] → [1, 3, F, 2h, 2w]; the column is the slower index of a colour's channels
        x = g.reshape(g.op("Unsqueeze", x, g.constant([0])), [3, 2, 2, frames, 0, 0])
        x = merge_pixels(g, g.transpose(x, 0, 3, 4, 2, 5, 1), 3, frames)
    x = g.op("Clip", g.cast(x, FLOAT), g.constant(-1.0, FLOAT), g.constant(1.0, FLOAT))
    g.output("frames", x, g.video(3, frames, spec.spatial_stride))
    g.give_caches(spec.decoder_caches)
    return g


def _decoder(g: VaeGraph, x: ir.Value) -> tuple[ir.Value, int]:
    """``[1, z, 1, h, w]`` → ``[1, 3·patch², F, 8h, 8w]`` and F."""
    widths, frames = g.spec.decoder_widths, 1
    with g.scope("conv1"):
        x = causal_conv(g, x)
    x = middle(g, x, widths[0])
    for stage in range(len(widths) - 1):
        x, frames = _stage(g, x, stage, frames)
    return head(g, x, widths[-1]), frames


def _stage(g: VaeGraph, x: ir.Value, stage: int, frames: int) -> tuple[ir.Value, int]:
    """Residual blocks; every stage but the last then doubles rows and columns, and some also the frames."""
    spec, entering = g.spec, x
    widths = spec.decoder_stage_input(stage), spec.decoder_widths[stage + 1]
    blocks = spec.blocks_per_stage + 1
    for index in range(blocks):
        with g.scope(vae_module("upsamples", spec, stage, index)):
            x = residual_block(g, x, widths[min(index, 1)], widths[1])
    if stage == len(spec.temporal_down):
        return x, frames
    with g.scope(vae_module("upsamples", spec, stage, blocks)):
        x, leaving_frames = _upsample(g, x, widths[1], frames)
    if spec.residual:
        with g.scope(f"upsamples.{stage}.avg_shortcut"):
            x = g.add(x, _duplicate(g, entering, widths, frames, leaving_frames))
    return x, leaving_frames


def _upsample(g: VaeGraph, x: ir.Value, width: int, frames: int) -> tuple[ir.Value, int]:
    """Double rows and columns, and frames if the stage does; a video's first frame is neither doubled nor remembered.

    Two frames come from the lower and the upper half of the time convolution's channels.
    """
    if g.has("time_conv"):
        with g.scope("time_conv"):
            if g.first:
                shape = g.concat([g.constant([1, width, 2]), g.op("Shape", x, start=3, end=5)], 0)
                g.remember(g.op("Expand", g.constant(0.0, FLOAT), shape))
            else:
                halves = g.reshape(causal_conv(g, x), [2, width, frames, 0, 0])
                frames *= 2
                x = g.reshape(g.transpose(halves, 1, 2, 0, 3, 4), [1, width, frames, 0, 0])
    x = _enlarge(g, x, width, frames)
    with g.scope("resample.1"):
        return conv(g, x), frames


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


def _duplicate(g: VaeGraph, x: ir.Value, widths: tuple[int, int], frames: int, leaving_frames: int) -> ir.Value:
    """The shortcut around a stage of VAE 2.2 (DupUp3D, §4.1): repeat every value over the box it expands to."""
    entering, leaving = widths
    if entering not in (leaving, *([] if leaving_frames > frames else [2 * leaving, 4 * leaving])):
        raise unsupported_shortcut(entering, leaving)
    if leaving_frames > frames:
        x = g.op("Expand", g.reshape(x, [entering, frames, 1, 0, 0]), g.constant([1, 1, 2, 1, 1]))
        x = g.reshape(x, [1, entering, leaving_frames, 0, 0])
    return _enlarge(g, x, leaving, leaving_frames, sources=entering // leaving)
