"""Parameters and FLOPs of a model, from its spec alone, without weights or a GPU.

The transformer's formulas are in wan22.md §2.8; the VAE is listed layer by layer (§4.2), which gives both parameters
and FLOPs. A multiply-add counts as two operations.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.precision import Number, Precision
from wan22.specs import PATCH, TEXT_TOKENS, ModelSpec
from wan22.strips import Half, edge_scale

TIME_TAPS = 3  # of the convolutions over time alone


@dataclass(frozen=True)
class BlockParameters:
    """Parameters of one transformer block: ``linear``, the matrices, which FP8 quantises; their biases; the rest."""

    linear: int
    bias: int
    other: int  # norms and modulation

    @property
    def total(self) -> int:
        return self.linear + self.bias + self.other


@dataclass(frozen=True)
class BlockVectors:
    """Numbers in the vectors that the quantised matrices of a block store, in float32."""

    outputs: int  # a scale for every output
    inputs: int  # one mean, and one factor, for every input that is centred: not that of the text's keys and values


@dataclass(frozen=True)
class DitFlops:
    """FLOPs of one forward: one expert, one step, one of the two guidance branches."""

    linears: float  # for tokens and text
    feed_forward: float  # of these, the two linears of the feed-forward
    self_attention: float
    cross_attention: float

    @property
    def total(self) -> float:
        return self.linears + self.self_attention + self.cross_attention


def block_parameters(spec: DitSpec) -> BlockParameters:
    width, ffn = spec.width, spec.ffn_width
    norms = 4 * width + 2 * width  # norms of q and k in both attentions; the affine norm before cross-attention
    return BlockParameters(8 * width**2 + 2 * width * ffn, 8 * width + ffn + width, norms + 6 * width)


def block_vectors(spec: DitSpec) -> BlockVectors:
    width, ffn = spec.width, spec.ffn_width
    return BlockVectors(9 * width + ffn, 5 * width + ffn)


def matrices_bytes(spec: DitSpec, precision: Precision, low_rank: int = 0) -> float:
    """The size of a block's matrices in ``precision``, which may have another type outside the feed-forward.

    ``low_rank`` is that of a 16-bit branch beside each one in NVFP4.
    """
    feed_forward = 2 * spec.width * spec.ffn_width
    others = block_parameters(spec).linear - feed_forward
    beside, sides = precision.beside_feed_forward, sum(_branch_sides(spec, precision))
    return (feed_forward * precision.linears.stored_bits + others * beside.stored_bits + 16 * low_rank * sides) / 8


def branch_flops(spec: DitSpec, tokens: int, precision: Precision, low_rank: int) -> float:
    """FLOPs of the branches beside NVFP4 matrices in one forward; those of the text are left out."""
    return 2 * spec.layers * tokens * low_rank * _branch_sides(spec, precision)[0]


def _branch_sides(spec: DitSpec, precision: Precision) -> tuple[int, int]:
    """Inputs and outputs of a block's NVFP4 matrices that tokens enter, and that the text enters."""
    feed_forward = 2 * (spec.width + spec.ffn_width) if precision.linears is Number.NVFP4 else 0
    if precision.beside_feed_forward is not Number.NVFP4:
        return feed_forward, 0
    return feed_forward + 10 * spec.width, 3 * spec.width  # q, k and v are one matrix, as are k and v of the text


def vectors_bytes(spec: DitSpec, precision: Precision) -> float:
    """The size of the vectors that a block stores beside its matrices and biases in ``precision``."""
    if not precision.quantised:
        return 0.0
    vectors = block_vectors(spec)
    return 4.0 * (vectors.outputs + vectors.inputs * (2 if precision.linears.smoothed else 1))


def dit_parameters(spec: DitSpec) -> int:
    """Parameters of one expert, or of the only transformer."""
    width = spec.width
    patch = PATCH[0] * PATCH[1] * PATCH[2]
    ends = _linear(spec.in_channels * patch, width) + _linear(width, spec.out_channels * patch) + 2 * width
    text = _linear(spec.text_width, width) + _linear(width, width)
    time = _linear(spec.freq_width, width) + _linear(width, width) + _linear(width, 6 * width)
    return ends + text + time + spec.layers * block_parameters(spec).total


def text_encoder_parameters(spec: TextEncoderSpec) -> int:
    inner = spec.heads * spec.head_width
    layer = 4 * spec.width * inner + 3 * spec.width * spec.ffn_width + 2 * spec.width + spec.buckets * spec.heads
    return spec.vocab * spec.width + spec.layers * layer + spec.width


def dit_flops(spec: DitSpec, tokens: int) -> DitFlops:
    """FLOPs of one forward (wan22.md §2.8), without embeddings and head, which are under 0.1 %."""
    n, width = spec.layers, spec.width
    return DitFlops(
        linears=n * tokens * (12 * width**2 + 4 * width * spec.ffn_width) + n * TEXT_TOKENS * 4 * width**2,
        feed_forward=n * tokens * 4 * width * spec.ffn_width,
        self_attention=4 * n * tokens**2 * width,
        cross_attention=4 * n * tokens * TEXT_TOKENS * width,
    )


def text_encoder_flops(spec: TextEncoderSpec, tokens: int = TEXT_TOKENS) -> float:
    inner = spec.heads * spec.head_width
    per_token = 2 * (4 * spec.width * inner + 3 * spec.width * spec.ffn_width)
    return spec.layers * (tokens * per_token + 4 * tokens**2 * inner)


# -- the VAE


@dataclass(frozen=True)
class VaeLayer:
    """A convolution with its norm, or an attention. Sizes are relative to the latent grid."""

    entering: int
    leaving: int
    taps: int = 0
    scale: int = 1  # output rows and columns over those of the latent grid
    frames: int = 1  # output frames
    norm: int = 0  # channels of the norm before it
    attends: bool = False

    @property
    def parameters(self) -> int:
        return self.norm + ((self.entering * self.taps + 1) * self.leaving if self.taps else 0)

    def flops(self, latent_size: tuple[int, int]) -> float:
        positions = latent_size[0] * latent_size[1] * self.scale**2
        if self.attends:
            return 4.0 * self.frames * positions**2 * self.leaving
        return 2.0 * self.entering * self.taps * self.leaving * self.frames * positions


def decoder_layers(spec: VaeSpec, first: bool = False) -> Iterator[VaeLayer]:
    """The decoder's layers for one latent frame. The ``first`` one gives a single frame and skips time convolutions.

    No frame precedes the first one, so only the last 3x3 of the 3x3x3 taps of its convolutions count; the official code
    multiplies the others by zeros.
    """
    widths, z, frames, taps = spec.decoder_widths, spec.latent_channels, 1, 9 if first else 27
    yield VaeLayer(z, z, 1)
    yield VaeLayer(z, widths[0], taps)
    yield from _middle(widths[0], taps)
    for stage, width in enumerate(widths[1:]):
        scale, entering = 2**stage, spec.decoder_stage_input(stage)
        for index in range(spec.blocks_per_stage + 1):
            yield from _residual(entering if index == 0 else width, width, taps, scale, frames)
        if stage == len(spec.temporal_down):
            continue
        if spec.temporal_down[::-1][stage]:
            yield VaeLayer(width, 2 * width, 3, scale, 0 if first else frames)
            frames *= 1 if first else 2
        yield VaeLayer(width, width if spec.residual else width // 2, 9, 2 * scale, frames)
    yield VaeLayer(widths[-1], 3 * spec.patch**2, taps, 2 ** (len(widths) - 2), frames, widths[-1])


def encoder_layers(spec: VaeSpec, first: bool = False) -> Iterator[VaeLayer]:
    """The encoder's layers for one latent frame, from four frames or, like the decoder's, from the ``first`` one."""
    widths, z, taps = spec.encoder_widths, spec.latent_channels, 9 if first else 27
    scale, frames = 2 ** len(spec.temporal_down), 1 if first else spec.temporal_stride
    yield VaeLayer(3 * spec.patch**2, widths[0], taps, scale, frames)
    for stage, (entering, width) in enumerate(itertools.pairwise(widths)):
        for index in range(spec.blocks_per_stage):
            yield from _residual(entering if index == 0 else width, width, taps, scale, frames)
        if stage == len(spec.temporal_down):
            continue
        scale //= 2
        yield VaeLayer(width, width, 9, scale, frames)
        if spec.temporal_down[stage]:
            frames = frames if first else frames // 2
            yield VaeLayer(width, width, 3, scale, 0 if first else frames)
    yield from _middle(widths[-1], taps)
    yield VaeLayer(widths[-1], 2 * z, taps, 1, 1, widths[-1])
    yield VaeLayer(2 * z, 2 * z, 1)


def motion_parameters(spec: VaeSpec, half: Half, first: bool) -> int:
    """Parameters of the stage that doubles or halves frames, the only one with separate graphs for the first chunk."""
    ends = 9  # layers of the middle, with the convolutions between it and the latents
    if half == "vae_decoder":
        layers = [layer for layer in [*decoder_layers(spec, first)][ends:] if layer.scale <= edge_scale("pictures")]
    else:
        every = [*encoder_layers(spec, first)][:-ends]
        layers = every[next(index for index, layer in enumerate(every) if layer.taps == TIME_TAPS) :]
    return sum(layer.parameters for layer in layers if not (first and layer.taps == TIME_TAPS))


def _residual(entering: int, leaving: int, taps: int, scale: int = 1, frames: int = 1) -> Iterator[VaeLayer]:
    yield VaeLayer(entering, leaving, taps, scale, frames, entering)
    yield VaeLayer(leaving, leaving, taps, scale, frames, leaving)
    if entering != leaving:
        yield VaeLayer(entering, leaving, 1, scale, frames)


def _middle(width: int, taps: int) -> Iterator[VaeLayer]:
    yield from _residual(width, width, taps)
    yield VaeLayer(width, 3 * width, 1, norm=width)
    yield VaeLayer(width, width, attends=True)
    yield VaeLayer(width, width, 1)
    yield from _residual(width, width, taps)


def vae_parameters(spec: VaeSpec) -> dict[str, int]:
    """Parameters by half, each including its 1×1×1 convolution next to the latents."""
    return {
        "vae_decoder": sum(layer.parameters for layer in decoder_layers(spec)),
        "vae_encoder": sum(layer.parameters for layer in encoder_layers(spec)),
    }


def vae_flops(spec: VaeSpec, half: str, latent_size: tuple[int, int], latent_frames: int) -> float:
    """FLOPs to decode or encode ``latent_frames`` frames of ``latent_size`` (rows, columns), chunk by chunk."""
    layers = decoder_layers if half == "vae_decoder" else encoder_layers
    first, later = (sum(layer.flops(latent_size) for layer in layers(spec, first)) for first in (True, False))
    return first + (latent_frames - 1) * later


def model_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters by part, for every expert; the VAE's encoder only if the model uses it."""
    vae = vae_parameters(spec.vae)
    used = [half for half in ("vae_encoder", "vae_decoder") if any(name.startswith(half) for name in spec.components)]
    experts = {expert: dit_parameters(spec.dit) for expert in spec.experts}
    return {"text_encoder": text_encoder_parameters(spec.text_encoder)} | experts | {half: vae[half] for half in used}


def cache_elements(spec: VaeSpec, half: str, latent_size: tuple[int, int]) -> int:
    """The number of elements that a streaming half passes from chunk to chunk."""
    caches = spec.decoder_caches if half == "vae_decoder" else spec.encoder_caches
    positions = latent_size[0] * latent_size[1]
    return sum(cache.channels * cache.frames * cache.scale**2 * positions for cache in caches)


def _linear(entering: int, leaving: int) -> int:
    return (entering + 1) * leaving
