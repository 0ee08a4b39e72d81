"""All constants of the Wan2.2 models that more than one stage needs, as frozen dataclasses.

Tiny models have the structure of their originals (both experts, all caches, the same latent channels) with small
widths, so that the whole flow runs on a laptop CPU in seconds. Sources: the official configurations (Wan-Video/Wan2.2,
``wan/configs``) and diffusers'.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from wan22.errors import UserError
from wan22.parts import VAE_2_1, VAE_2_2, DitSpec, TextEncoderSpec, VaeSpec
from wan22.sampling import SamplingSpec, preset_named

PATCH = (1, 2, 2)  # latent frames, rows and columns per token
TEXT_TOKENS = 512  # rows of text in the transformer; unused rows are exact zeros
TRAIN_TIMESTEPS = 1000
POSITIONS = 1024  # maximum number of tokens per axis in the transformers' rotary embedding
CUSTOM = "-custom"  # suffix of the name of a model with unknown dimensions


class Task(StrEnum):
    """``model_type`` in official configurations. Code checks :attr:`ModelSpec.takes` instead of the task."""

    T2V = "t2v"
    I2V = "i2v"
    TI2V = "ti2v"


FAMILY = "wan2.2-"
ImageUse = Literal["no", "optional", "required"]
Resizing = Literal["stretch", "cover"]


@dataclass(frozen=True)
class Takes:
    """The inputs of a model other than text."""

    image: ImageUse = "no"
    last_image: bool = False
    resizing: Resizing = "stretch"  # "stretch" images to the video's size, or "cover" it and crop (§6)
    clean_first_frame: bool = False  # latent frame 0 is the noise-free image, its tokens at timestep 0 (§2.6)
    mask_channels: int = 0  # of the condition, before the channels of the encoded video; 0 means no condition

    def condition_channels(self, latent_channels: int) -> int:
        """The number of channels of the condition; 0 without one."""
        return self.mask_channels + latent_channels if self.mask_channels else 0


TAKES = {
    Task.T2V: Takes(),
    Task.I2V: Takes("required", last_image=True, mask_channels=4),
    Task.TI2V: Takes("optional", resizing="cover", clean_first_frame=True),
}


@dataclass(frozen=True)
class ModelSpec:
    name: str
    task: Task
    dit: DitSpec
    text_encoder: TextEncoderSpec
    vae: VaeSpec
    sampling: SamplingSpec

    @property
    def public_name(self) -> str:
        """The name by which clients of the gateway know the model."""
        return self.name if self.name.startswith(FAMILY) else FAMILY + self.name

    @property
    def takes(self) -> Takes:
        return TAKES[self.task]

    @property
    def experts(self) -> tuple[str, ...]:
        return ("dit",) if self.sampling.boundary is None else ("high_noise", "low_noise")

    @property
    def components(self) -> tuple[str, ...]:
        """The graphs of this model, in order of use."""
        chunks = ("first", "next") if self.takes.mask_channels else () if self.takes.image == "no" else ("first",)
        encoder = tuple(f"vae_encoder_{chunk}" for chunk in chunks)
        return ("text_encoder", *encoder, *self.experts, "vae_decoder_first", "vae_decoder_next")

    @property
    def size_multiple(self) -> int:
        """The divisor of width and height in pixels: VAE stride times patch."""
        return self.vae.spatial_stride * PATCH[1]

    def expert_at(self, timestep: float, step: int | None = None) -> str:
        """The expert for ``timestep`` (0…1000); the official code compares the truncated integer.

        ``step`` counts from 0 and determines the expert if sampling switches at a step instead of a timestep.
        """
        sampling = self.sampling
        if sampling.boundary is None:
            return "dit"
        if step is not None and sampling.switch_step is not None:
            return "high_noise" if step < sampling.switch_step else "low_noise"
        return "high_noise" if timestep >= sampling.boundary * TRAIN_TIMESTEPS else "low_noise"

    def with_preset(self, name: str) -> "ModelSpec":
        """The model with preset ``name`` applied to its release's settings; boundary, frames, fps and sizes are kept.

        Raises:
            UserError: the preset does not exist or is for other models.
        """
        proper, preset = preset_named(name, self.task)
        release, own = SPECS.get(self.name.removesuffix(CUSTOM), self).sampling, self.sampling
        kept = {"boundary": own.boundary, "frames": own.frames, "fps": own.fps, "sizes": own.sizes}
        return replace(self, sampling=replace(release, **{**kept, **preset.changes, "preset": proper}))

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int, int]:
        """The latent shape ``[1, z, T, h, w]`` of a video; UserError for a size or number of frames not supported."""
        self.check_size(width, height)
        self.check_frames(frames)
        stride = self.vae.spatial_stride
        latent_frames = 1 + (frames - 1) // self.vae.temporal_stride
        return (1, self.vae.latent_channels, latent_frames, height // stride, width // stride)

    def check_size(self, width: int, height: int) -> None:
        multiple = self.size_multiple
        if max(width, height) > (most := POSITIONS * multiple):
            raise UserError(f"size {width}x{height}", f"sides of at most {most} pixels", "make it smaller")
        if width > 0 and height > 0 and width % multiple == 0 and height % multiple == 0:
            return
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise UserError(f"size {width}x{height}", f"width and height divisible by {multiple}", f"use --size {near}")

    def check_frames(self, frames: int) -> None:
        stride = self.vae.temporal_stride
        if frames > (most := 1 + (POSITIONS - 1) * stride):
            raise UserError(f"{frames} frames", f"at most {most}", "make the video shorter")
        if frames > 0 and (frames - 1) % stride == 0:
            return
        near = max(0, round((frames - 1) / stride)) * stride + 1
        raise UserError(f"{frames} frames", f"a multiple of {stride} plus 1 (1, 5, 9, ...)", f"use --frames {near}")


def tokens(latent_shape: tuple[int, ...]) -> int:
    """The transformer's number of tokens for latents ``[1, z, T, h, w]``."""
    t, h, w = latent_shape[-3:]
    return (t // PATCH[0]) * (h // PATCH[1]) * (w // PATCH[2])


_UMT5_XXL = TextEncoderSpec(width=4096, ffn_width=10240, layers=24, heads=64, vocab=256384)
_A14B_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))

T2V_A14B = ModelSpec(
    name="t2v-a14b",
    task=Task.T2V,
    dit=DitSpec(in_channels=16, out_channels=16, width=5120, ffn_width=13824, layers=40, heads=40),
    text_encoder=_UMT5_XXL,
    vae=VAE_2_1,
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
    sampling=replace(T2V_A14B.sampling, shift=5.0, boundary=0.9, guidance={"high_noise": 3.5, "low_noise": 3.5}),
)  # fmt: skip
TI2V_5B = ModelSpec(
    name="ti2v-5b",
    task=Task.TI2V,
    dit=DitSpec(
        in_channels=48, out_channels=48, width=3072, ffn_width=14336, layers=30, heads=24, time_rows=2
    ),
    text_encoder=_UMT5_XXL,
    vae=VAE_2_2,
    sampling=SamplingSpec(
        steps=50, shift=5.0, guidance={"dit": 5.0}, frames=121, fps=24, sizes=((1280, 704), (704, 1280))
    ),
)  # fmt: skip

PUBLISHED = (T2V_A14B, I2V_A14B, TI2V_5B)

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


# The trained tiny model (studies/tiny_model); the shift suits its 120 tokens.
_TOY = replace(
    _tiny(T2V_A14B, (96, 64)),
    name="t2v-a14b-toy",
    dit=replace(T2V_A14B.dit, width=160, ffn_width=384, layers=5, heads=5, text_width=128),
    vae=replace(VAE_2_1, encoder_base=12, decoder_base=12),
    sampling=replace(T2V_A14B.sampling, steps=20, shift=3.0, frames=17, fps=8, sizes=((96, 64),)),
)

SPECS = {
    spec.name: spec
    for spec in (
        *PUBLISHED,
        _tiny(T2V_A14B, (256, 160)),
        _tiny(I2V_A14B, (256, 160)),
        _tiny(TI2V_5B, (256, 160)),
        _TOY,
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
        raise UserError(f"model {name!r}", f"one of {', '.join(SPECS)}", "choose one of these")
    return SPECS[name]


def named_after_dimensions(spec: ModelSpec) -> ModelSpec:
    """The known model with the dimensions of ``spec``; otherwise ``spec`` with its name marked as custom."""
    for known in SPECS.values():
        if replace(known, name=spec.name, sampling=spec.sampling) == spec:
            return known
    return replace(spec, name=f"{spec.name}{CUSTOM}")
