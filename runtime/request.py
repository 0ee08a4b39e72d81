"""What a user asks a pipeline for, and its completion with the model's defaults."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from runtime.arrays import F32
from runtime.image import open_image
from runtime.image_condition import Fit, video_size
from runtime.noise import standard_normal
from runtime.schedule import Schedule, make_schedule
from wan22.errors import UserError, warn_once
from wan22.quantities import counted
from wan22.residency import Video
from wan22.sampling import NEGATIVE_PROMPT, PRESETS, Convention, SamplingSpec, SolverName
from wan22.specs import ModelSpec

T = TypeVar("T")
MOST_GUIDANCE = 100


@dataclass(frozen=True)
class Request:
    """One video. ``None`` means the preset's or else the bundle's own default; :meth:`completed` fills it in."""

    prompt: str | None = None  # a video needs one; None where a file of prompts or a built-in one follows
    negative_prompt: str | None = None  # None: the official one; "": none at all
    # video
    size: tuple[int, int] | None = None  # width, height in pixels; with an image: about that many pixels, its shape
    frames: int | None = None
    # image to video
    image: Path | bytes | None = None
    last_image: Path | bytes | None = None
    fit: Fit = "official"
    exact_official: bool = False  # the official rounding of sizes, float errors included
    # sampling
    seed: int = 0
    noise: F32 | None = field(default=None, compare=False)  # [z, T, h, w] or [1, z, T, h, w]; instead of the seed's
    preset: str | None = None  # of wan22.sampling.PRESETS
    boundary: float | None = None  # share of the timesteps above which the high-noise expert works
    steps: int | None = None
    shift: float | None = None
    guidance: dict[str, float] = field(default_factory=dict)  # by expert name; 1 skips the unconditional pass
    guidance_scale: float | None = None  # of the experts that ``guidance`` does not name
    solver: SolverName | None = None
    schedule: Convention | None = None

    def shape(self, spec: ModelSpec, usual: Video | None = None) -> Video:
        """The size that is asked for, before an image gives it its shape, and the frames; defaults from ``usual``."""
        width, height, frames = usual or (*spec.sampling.sizes[0], spec.sampling.frames)
        return (*(self.size or (width, height)), _or(self.frames, frames))

    def completed(self, spec: ModelSpec, usual: Video | None = None) -> "CompleteRequest":
        """The request with images opened and every default filled in.

        Args:
            spec: of the model, whose defaults these are.
            usual: the video where the request states none, see :func:`runtime.built_for.completed`.

        Raises:
            UserError: no prompt, an image where none belongs or none where one does, a size, frames, guidance, boundary
                or preset that the model cannot have, steps and a shift that make no schedule.
        """
        if self.prompt is None:
            raise UserError("no prompt", "some text", "describe a video")
        for text in (self.prompt, self.negative_prompt or ""):
            if any("\ud800" <= character <= "\udfff" for character in text):  # would break the report or the manifest
                raise UserError(f"prompt {text!r}", "text that UTF-8 can hold", "write it in UTF-8")
        sampling = (spec if self.preset is None else spec.with_preset(self.preset)).sampling
        image = self._image(spec)
        width, height, frames = self.shape(spec, usual)
        asked_size = (width, height)
        if image is not None:
            width, height = video_size(spec, image.size, asked_size, self.fit, exact_official=self.exact_official)
        latent_shape = spec.latent_shape(width, height, frames)
        complete = CompleteRequest(
            prompt=self.prompt,
            negative_prompt=_or(self.negative_prompt, _or(sampling.negative_prompt, NEGATIVE_PROMPT)),
            width=width,
            height=height,
            frames=frames,
            latent_shape=latent_shape,
            image=image,
            last_image=None if self.last_image is None else open_image(self.last_image),
            fit=self.fit,
            seed=self.seed,
            noise=self._noise(latent_shape),
            steps=_or(self.steps, sampling.steps),
            shift=_or(self.shift, sampling.shift),
            guidance=self._guidance(spec, sampling),
            solver=_or(self.solver, sampling.solver),
            schedule=_or(self.schedule, sampling.schedule),
            sigmas=self._sigmas(sampling),
            boundary=self._boundary(spec),
            switch_step=self._switch_step(sampling),
            asked=replace(self, size=asked_size),
        )
        complete.noise_schedule()  # refused now, not later
        _warn_beyond_distillation(spec, complete)
        return complete

    def _noise(self, latent_shape: tuple[int, ...]) -> F32 | None:
        if self.noise is None:
            return None
        if self.noise.shape not in (latent_shape, latent_shape[1:]):
            found = f"noise of shape {list(self.noise.shape)}"
            raise UserError(found, f"{list(latent_shape)}, the latents", "choose the --size and --frames of the noise")
        if not np.isfinite(self.noise).all():
            raise UserError("noise with NaN or infinity", "finite numbers", "save it again")
        return self.noise.astype(np.float32).reshape(latent_shape)

    def _sigmas(self, sampling: SamplingSpec) -> tuple[float, ...]:
        for option, value in (("steps", self.steps), ("shift", self.shift)):
            if sampling.sigmas and value is not None:
                found = f"{option} {value:g} with preset {sampling.preset}"
                raise UserError(found, f"its own list of {len(sampling.sigmas)} noise levels", f"leave {option} out")
        return sampling.sigmas

    def _boundary(self, spec: ModelSpec) -> float | None:
        if self.boundary is None:
            return None
        if len(spec.experts) == 1:
            raise UserError(f"a boundary for {spec.name}", "a model with two experts", "leave it out")
        if not 0 <= self.boundary <= 1:  # refuses NaN as well
            raise UserError(f"boundary {self.boundary:g}", "a share of the timesteps, 0 to 1", "use one near 0.9")
        return self.boundary

    def _switch_step(self, sampling: SamplingSpec) -> int | None:
        """The preset's, which counts its own steps; a boundary goes before it."""
        own_steps = self.steps is None or self.steps == sampling.steps
        return sampling.switch_step if self.boundary is None and own_steps else None

    def _image(self, spec: ModelSpec) -> Image.Image | None:
        if self.image is None and spec.takes.image == "required":
            raise UserError(f"no image for {spec.name}", "an image to start from", "give one with --image")
        if self.image is not None and spec.takes.image == "no":
            raise UserError(f"an image for {spec.name}", "text only", "leave it out, or use an I2V or TI2V model")
        if self.last_image is not None and not spec.takes.last_image:
            raise UserError(f"a last image for {spec.name}", "an I2V model", "leave it out")
        return None if self.image is None else open_image(self.image)

    def _guidance(self, spec: ModelSpec, sampling: SamplingSpec) -> dict[str, float]:
        shared = {} if self.guidance_scale is None else dict.fromkeys(spec.experts, self.guidance_scale)
        given = shared | self.guidance
        for name, value in given.items():
            if name not in spec.experts:
                raise UserError(f"guidance for {name!r}", f"one of {', '.join(spec.experts)}", "name an expert")
            if not 0 <= value <= MOST_GUIDANCE:
                expected = f"a finite number from 0 to {MOST_GUIDANCE}"
                raise UserError(f"guidance {value} for {name}", expected, "the models use 3 to 5; 1 means no guidance")
        return {**sampling.guidance, **given}


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _warn_beyond_distillation(spec: ModelSpec, complete: "CompleteRequest") -> None:
    own = spec.sampling
    preset = PRESETS.get(own.preset)  # None: of a bundle by a later version
    if preset and preset.distilled and (complete.steps > own.steps or complete.guided):
        guided = " with guidance" if complete.guided else ""
        what = f"{counted(complete.steps, 'step')}{guided} on a checkpoint that is distilled for {own.preset}"
        warn_once(f"{what} ({own.steps} steps, no guidance): the video will be poor")


@dataclass(frozen=True)
class CompleteRequest:
    """A request with nothing left open."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    latent_shape: tuple[int, int, int, int, int]  # [1, z, T, h, w]
    image: Image.Image | None
    last_image: Image.Image | None
    fit: Fit
    seed: int
    steps: int
    shift: float
    guidance: dict[str, float]
    solver: SolverName
    schedule: Convention
    noise: F32 | None = field(default=None, compare=False)  # of latent_shape; None: the seed's
    sigmas: tuple[float, ...] = ()  # noise levels; instead of those of steps and shift
    boundary: float | None = None  # asked for; None: the model's
    switch_step: int | None = None  # first step of the low-noise expert; instead of the boundary

    asked: Request = field(default_factory=Request, compare=False)  # what this completes, with its size

    def noise_schedule(self) -> Schedule:
        """Raises UserError for settings that make none."""
        return make_schedule(self.solver, self.steps, self.shift, self.schedule, self.sigmas)

    def initial_noise(self) -> F32:
        """Float32 of ``latent_shape``: what was given, or else what torch's CPU generator draws for the seed."""
        return standard_normal(self.latent_shape, self.seed) if self.noise is None else self.noise

    def switched(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with the switch of experts of this request."""
        boundary = _or(self.boundary, spec.sampling.boundary)
        return replace(spec, sampling=replace(spec.sampling, boundary=boundary, switch_step=self.switch_step))

    @property
    def video(self) -> Video:
        return self.width, self.height, self.frames

    @property
    def guided(self) -> bool:
        """Some step needs the unconditional pass."""
        return any(value != 1 for value in self.guidance.values())
