"""Dimensions of the parts of a model: transformer, text encoder and VAE, with the two VAEs of Wan2.2."""

import itertools
from dataclasses import dataclass

LATENTS_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENTS_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def rope_split(head_width: int) -> tuple[int, int, int]:
    """The numbers of complex pairs of a head that rotate with the latent frame, row and column: 22, 21, 21 for 128."""
    side = head_width // 6
    return head_width // 2 - 2 * side, side, side


@dataclass(frozen=True)
class DitSpec:
    """The diffusion transformer; one spec serves both experts."""

    in_channels: int  # noise latents plus condition
    out_channels: int
    width: int
    ffn_width: int
    layers: int
    heads: int
    time_rows: int = 1  # 2 if the first latent frame has its own timestep (TI2V)
    freq_width: int = 256
    text_width: int = 4096
    eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def condition_channels(self) -> int:
        """Channels of the condition, which are not denoised: mask and encoded image for I2V, else 0."""
        return self.in_channels - self.out_channels


@dataclass(frozen=True)
class TextEncoderSpec:
    """The encoder half of umt5; every layer has its own table of relative position biases."""

    width: int
    ffn_width: int
    layers: int
    heads: int
    vocab: int
    head_width: int = 64
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class Cache:
    """The frames that one causal convolution of a streaming VAE keeps between chunks.

    Rows and columns are ``scale`` times those of the latent grid (at an encoder's pixel end, the spatial stride divided
    by the patch). ``frames`` is the fixed temporal length.
    """

    channels: int
    frames: int
    scale: int


@dataclass(frozen=True)
class VaeSpec:
    """A causal video autoencoder. ``generation`` is "2.1" (A14B models) or "2.2" (TI2V-5B)."""

    generation: str
    latent_channels: int
    encoder_base: int
    decoder_base: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_stage: int = 2  # in the encoder; the decoder has one more
    temporal_down: tuple[bool, ...] = (False, True, True)
    temporal_stride: int = 4

    @property
    def residual(self) -> bool:
        """True if stages have parameter-free shortcuts around them (2.2 only)."""
        return self.generation == "2.2"

    @property
    def patch(self) -> int:
        """The side of the pixel squares that become channels before the encoder and pixels after the decoder."""
        return 2 if self.residual else 1

    @property
    def spatial_stride(self) -> int:
        return 8 * self.patch

    @property
    def last_in_time(self) -> int:
        """The last stage of the decoder that doubles frames; those before it do, too."""
        return sum(self.temporal_down) - 1

    @property
    def first_in_time(self) -> int:
        """The first stage of the encoder that halves frames; those after it do, too, but for the last of all."""
        return len(self.temporal_down) - sum(self.temporal_down)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Input channels of each stage, then output channels of the last."""
        return tuple(self.encoder_base * m for m in (1, *self.multipliers))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Output channels of conv_in, then of each stage's residual blocks."""
        reverse = self.multipliers[::-1]
        return tuple(self.decoder_base * m for m in (reverse[0], *reverse))

    def decoder_stage_input(self, stage: int) -> int:
        """Input channels of a decoder stage: the upsampler of 2.1 halves them, that of 2.2 does not."""
        halved = stage > 0 and not self.residual
        return self.decoder_widths[stage] // (2 if halved else 1)

    @property
    def decoder_caches(self) -> tuple[Cache, ...]:
        """The 32 caches in execution order (wan22.md §4.5)."""
        widths, up_in_time = self.decoder_widths, self.temporal_down[::-1]
        caches = [Cache(self.latent_channels, 2, 1)] + [Cache(widths[0], 2, 1)] * 4
        for stage, width in enumerate(widths[1:]):
            scale = 2**stage
            caches += [Cache(self.decoder_stage_input(stage), 2, scale)]
            caches += [Cache(width, 2, scale)] * (2 * self.blocks_per_stage + 1)
            if stage < len(up_in_time) and up_in_time[stage]:
                caches += [Cache(width, 2, scale)]
        return (*caches, Cache(widths[-1], 2, 2 ** (len(widths) - 2)))

    @property
    def encoder_caches(self) -> tuple[Cache, ...]:
        """The 24 caches in execution order; the two time convolutions keep one frame, all others two (§4.5)."""
        widths, top = self.encoder_widths, 2 ** len(self.temporal_down)
        caches = [Cache(3 * self.patch**2, 2, top)]
        for stage, (entering, width) in enumerate(itertools.pairwise(widths)):
            scale = top // 2**stage
            caches += [Cache(entering, 2, scale)] + [Cache(width, 2, scale)] * (2 * self.blocks_per_stage - 1)
            if stage < len(self.temporal_down) and self.temporal_down[stage]:
                caches += [Cache(width, 1, scale // 2)]
        return (*caches, *[Cache(widths[-1], 2, 1)] * 5)


VAE_2_1 = VaeSpec("2.1", 16, 96, 96, LATENTS_MEAN_2_1, LATENTS_STD_2_1)
VAE_2_2 = VaeSpec("2.2", 48, 160, 256, LATENTS_MEAN_2_2, LATENTS_STD_2_2)
