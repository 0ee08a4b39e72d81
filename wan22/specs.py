"""Every constant of the Wan2.2 models that more than one stage needs, as frozen dataclasses.

A stage asks the spec, never a second table. Tiny twins have the structure of their originals (both experts, all caches,
the same latent channels) with small widths, so that the whole flow runs on a laptop CPU in seconds. Numbers come from
the official configurations (Wan-Video/Wan2.2, ``wan/configs``) and from the diffusers configurations of these models.
"""

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum

from wan22.errors import UserError

PATCH = (1, 2, 2)  # latent frames, rows and columns per token
TEXT_TOKENS = 512  # rows of text that the transformer sees, the unused ones exact zeros
TRAIN_TIMESTEPS = 1000
POSITIONS = 1024  # tokens per axis that the transformers' rotary embedding knows

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

# The negative prompt of the official release: garish, overexposed, static, blurred details, subtitles, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class Precision(StrEnum):
    """What the matrix multiplications of a component run in. Sensitive parts stay in float32 whatever it says."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"  # FP8 linears, 16-bit attention
    FP8_ATTN = "fp8-attn"  # FP8 linears and attention


class Task(StrEnum):
    T2V = "t2v"
    I2V = "i2v"
    TI2V = "ti2v"


def rope_split(head_width: int) -> tuple[int, int, int]:
    """Complex pairs of a head that turn with the latent frame, row and column: 22, 21, 21 of a 128-wide head."""
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
    time_rows: int = 1  # 2: the first latent frame has a timestep of its own (TI2V)
    freq_width: int = 256
    text_width: int = 4096
    eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def condition_channels(self) -> int:
        """Channels that are given, not denoised: mask and encoded image of I2V, none elsewhere."""
        return self.in_channels - self.out_channels

    @property
    def rope_split(self) -> tuple[int, int, int]:
        return rope_split(self.head_width)


@dataclass(frozen=True)
class TextEncoderSpec:
    """The encoder half of umt5; every layer owns its table of relative position biases."""

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
    """One causal convolution's memory between chunks of a streaming VAE.

    ``scale`` relates its rows and columns to the latent grid: a decoder cache is ``scale`` times as large, and so is an
    encoder cache (which at the pixel end reaches the spatial stride). ``frames`` is its fixed temporal length.
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
    blocks_per_stage: int = 2  # of the encoder; the decoder has one more
    temporal_down: tuple[bool, ...] = (False, True, True)
    temporal_stride: int = 4

    @property
    def residual(self) -> bool:
        """Stages have parameter-free shortcuts around them (2.2 only)."""
        return self.generation == "2.2"

    @property
    def patch(self) -> int:
        """Pixels per side that become channels before the encoder and after the decoder."""
        return 2 if self.residual else 1

    @property
    def spatial_stride(self) -> int:
        return 8 * self.patch

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels entering each stage, then those leaving the last."""
        return tuple(self.encoder_base * m for m in (1, *self.multipliers))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels leaving conv_in, then those leaving each stage's residual blocks."""
        reverse = self.multipliers[::-1]
        return tuple(self.decoder_base * m for m in (reverse[0], *reverse))

    def decoder_stage_input(self, stage: int) -> int:
        """Channels entering a decoder stage: the upsampler of 2.1 halves them, that of 2.2 does not."""
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


@dataclass(frozen=True)
class SamplingSpec:
    """What the official release samples with when the user says nothing."""

    steps: int
    shift: float
    guidance: dict[str, float]  # by expert name
    frames: int
    fps: int
    sizes: tuple[tuple[int, int], ...]  # width, height in pixels; the first is the default
    boundary: float | None = None  # share of the timesteps above which the high-noise expert works


@dataclass(frozen=True)
class ModelSpec:
    name: str
    task: Task
    dit: DitSpec
    text_encoder: TextEncoderSpec
    vae: VaeSpec
    sampling: SamplingSpec

    @property
    def experts(self) -> tuple[str, ...]:
        return ("dit",) if self.sampling.boundary is None else ("high_noise", "low_noise")

    @property
    def components(self) -> tuple[str, ...]:
        """The graphs of this model, in the order in which a run uses them."""
        encoder = {
            Task.T2V: (),
            Task.I2V: ("vae_encoder_first", "vae_encoder_next"),
            Task.TI2V: ("vae_encoder_first",),
        }[self.task]
        return ("text_encoder", *encoder, *self.experts, "vae_decoder_first", "vae_decoder_next")

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels must be multiples of this: VAE stride times patch."""
        return self.vae.spatial_stride * PATCH[1]

    def expert_at(self, timestep: float) -> str:
        """The expert that denoises at ``timestep`` (0…1000); the official code compares the truncated integer."""
        if self.sampling.boundary is None:
            return "dit"
        return "high_noise" if timestep >= self.sampling.boundary * TRAIN_TIMESTEPS else "low_noise"

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int, int]:
        """``[1, z, T, h, w]`` of a video of that many pixels and frames; refuses what the model cannot make."""
        self.check_size(width, height)
        self.check_frames(frames)
        stride = self.vae.spatial_stride
        latent_frames = 1 + (frames - 1) // self.vae.temporal_stride
        return (1, self.vae.latent_channels, latent_frames, height // stride, width // stride)

    @property
    def longest_side(self) -> int:
        """In pixels."""
        return POSITIONS * self.size_multiple

    @property
    def most_frames(self) -> int:
        return 1 + (POSITIONS - 1) * self.vae.temporal_stride

    def check_size(self, width: int, height: int) -> None:
        multiple = self.size_multiple
        if max(width, height) > self.longest_side:
            raise UserError(f"size {width}x{height}", f"sides of at most {self.longest_side} pixels", "make it smaller")
        if width > 0 and height > 0 and width % multiple == 0 and height % multiple == 0:
            return
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise UserError(f"size {width}x{height}", f"width and height divisible by {multiple}", f"use --size {near}")

    def check_frames(self, frames: int) -> None:
        stride = self.vae.temporal_stride
        if frames > self.most_frames:
            raise UserError(f"{frames} frames", f"at most {self.most_frames}", "make the video shorter")
        if frames > 0 and (frames - 1) % stride == 0:
            return
        near = max(0, round((frames - 1) / stride)) * stride + 1
        raise UserError(f"{frames} frames", f"a multiple of {stride} plus 1 (1, 5, 9, ...)", f"use --frames {near}")


def tokens(latent_shape: tuple[int, ...]) -> int:
    """Tokens of the transformer for latents ``[1, z, T, h, w]``."""
    t, h, w = latent_shape[-3:]
    return (t // PATCH[0]) * (h // PATCH[1]) * (w // PATCH[2])


_UMT5_XXL = TextEncoderSpec(width=4096, ffn_width=10240, layers=24, heads=64, vocab=256384)
_VAE_2_1 = VaeSpec("2.1", 16, 96, 96, LATENTS_MEAN_2_1, LATENTS_STD_2_1)
_VAE_2_2 = VaeSpec("2.2", 48, 160, 256, LATENTS_MEAN_2_2, LATENTS_STD_2_2)
_A14B_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))

T2V_A14B = ModelSpec(
    name="t2v-a14b",
    task=Task.T2V,
    dit=DitSpec(in_channels=16, out_channels=16, width=5120, ffn_width=13824, layers=40, heads=40),
    text_encoder=_UMT5_XXL,
    vae=_VAE_2_1,
    sampling=SamplingSpec(
        steps=40, shift=12.0, boundary=0.875, guidance={"high_noise": 4.0, "low_noise": 3.0},
        frames=81, fps=16, sizes=_A14B_SIZES,
    ),
)  # fmt: skip
I2V_A14B = replace(
    T2V_A14B,
    name="i2v-a14b",
    task=Task.I2V,
    dit=replace(T2V_A14B.dit, in_channels=36),
    sampling=replace(
        T2V_A14B.sampling, shift=5.0, boundary=0.9, guidance={"high_noise": 3.5, "low_noise": 3.5}
    ),
)  # fmt: skip
TI2V_5B = ModelSpec(
    name="ti2v-5b",
    task=Task.TI2V,
    dit=DitSpec(
        in_channels=48, out_channels=48, width=3072, ffn_width=14336, layers=30, heads=24, time_rows=2
    ),
    text_encoder=_UMT5_XXL,
    vae=_VAE_2_2,
    sampling=SamplingSpec(
        steps=50, shift=5.0, guidance={"dit": 5.0}, frames=121, fps=24, sizes=((1280, 704), (704, 1280))
    ),
)  # fmt: skip

_TINY_DIT = {"width": 256, "ffn_width": 512, "layers": 2, "heads": 2, "text_width": 128}
_TINY_TEXT = TextEncoderSpec(width=128, ffn_width=256, layers=2, heads=4, vocab=1024, head_width=32)


def _tiny(spec: ModelSpec, size: tuple[int, int]) -> ModelSpec:
    return replace(
        spec,
        name=f"{spec.name}-tiny",
        dit=replace(spec.dit, **_TINY_DIT),
        text_encoder=_TINY_TEXT,
        vae=replace(spec.vae, encoder_base=16, decoder_base=16),
        sampling=replace(spec.sampling, steps=8, frames=17, sizes=(size, size[::-1])),
    )


SPECS = {
    spec.name: spec
    for spec in (
        T2V_A14B,
        I2V_A14B,
        TI2V_5B,
        _tiny(T2V_A14B, (256, 160)),
        _tiny(I2V_A14B, (256, 160)),
        _tiny(TI2V_5B, (256, 160)),
        replace(
            T2V_A14B,
            name="t2v-a14b-small",
            dit=replace(T2V_A14B.dit, width=1024, ffn_width=2816, layers=4, heads=8),
            text_encoder=TextEncoderSpec(width=4096, ffn_width=1024, layers=1, heads=64, vocab=1024),
            vae=replace(T2V_A14B.vae, encoder_base=32, decoder_base=32),
        ),
    )
}


def spec_named(name: str) -> ModelSpec:
    if name not in SPECS:
        raise UserError(f"model {name!r}", f"one of {', '.join(SPECS)}", "name one of them")
    return SPECS[name]


def named_after_dimensions(spec: ModelSpec) -> ModelSpec:
    """``spec`` with the name and sampling defaults of the known model whose dimensions it has, else marked custom."""
    for known in SPECS.values():
        if replace(known, name=spec.name, sampling=spec.sampling) == spec:
            return known
    return replace(spec, name=f"{spec.name}-custom")
