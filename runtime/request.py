"""A user's request for a video, and its completion with the model's defaults."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from runtime.arrays import F32
from runtime.denoise import Sampler
from runtime.image import open_image
from runtime.image_condition import Fit, video_size
from runtime.magcache import magcache_steps
from runtime.noise import standard_normal
from runtime.schedule import Schedule, make_schedule
from runtime.solver import make_solver
from runtime.step_cache import StepCache
from wan22.caching import Caching
from wan22.errors import UserError, warn_once
from wan22.looks import with_terms
from wan22.quantities import counted
from wan22.residency import Video
from wan22.sampling import NEGATIVE_PROMPT, PRESETS, Convention, SamplingSpec, SolverName
from wan22.specs import ModelSpec

T = TypeVar("T")
MOST_GUIDANCE = 100


@dataclass(frozen=True)
class Request:
    """One video. ``None`` means the default of the preset, else of the bundle; :meth:`completed` fills it in."""

    prompt: str | None = None  # required for a video; None if a file of prompts or a built-in one follows
    negative_prompt: str | None = None  # None means the official one, "" no negative prompt
    # video
    size: tuple[int, int] | None = None  # width, height in pixels; an image replaces the aspect ratio, not the area
    frames: int | None = None
    # image to video
    image: Path | bytes | None = None
    last_image: Path | bytes | None = None
    fit: Fit = "official"
    exact_official: bool = False  # round sizes as the official code does, including its float errors
    # sampling
    seed: int = 0
    noise: F32 | None = field(default=None, compare=False)  # [z, T, h, w], with a 1 before or flat; not the seed's
    preset: str | None = None  # a name of wan22.sampling.PRESETS
    boundary: float | None = None  # fraction of the timestep range above which the high-noise expert is used
    steps: int | None = None
    shift: float | None = None
    guidance: dict[str, float] = field(default_factory=dict)  # by expert name; 1 skips the unconditional pass
    guidance_scale: float | None = None  # for the experts that ``guidance`` does not name
    solver: SolverName | None = None
    schedule: Convention | None = None
    cache: Caching | None = None  # estimates in place of transformer calls; needs 10 steps and a model not distilled
    lora: str | None = None  # a weight set of the pipeline; None means the bundle's own weights
    terms: tuple[str, ...] = ()  # looks and terms of wan22.looks, put in front of the prompt
    written: str = ""  # what the user wrote, where ``prompt`` was rewritten by :mod:`runtime.extend`
    extended_by: str = ""  # the model that rewrote it, and its host

    def shape(self, spec: ModelSpec, usual: Video | None = None) -> Video:
        """The requested width, height and frames, before an image's aspect ratio applies; defaults from ``usual``."""
        width, height, frames = usual or (*spec.sampling.sizes[0], spec.sampling.frames)
        return (*(self.size or (width, height)), _or(self.frames, frames))

    def completed(self, spec: ModelSpec, usual: Video | None = None) -> "CompleteRequest":
        """The request with opened images and every default filled in.

        Args:
            spec: the model, which provides the defaults.
            usual: the default video, see :func:`runtime.built_for.fill_defaults`; None means the model's.

        Raises:
            UserError: no prompt; an image missing or not supported; a size, frames, guidance, boundary, preset or step
                cache that the model does not support; steps and shift without a valid schedule.
        """
        if self.prompt is None:
            raise UserError("no prompt", "some text", "describe a video")
        for text in (self.prompt, self.negative_prompt or ""):
            if any("\ud800" <= character <= "\udfff" for character in text):  # cannot be written as UTF-8
                raise UserError(f"prompt {text!r}", "text that UTF-8 can hold", "write it in UTF-8")
        sampling = (spec if self.preset is None else spec.with_preset(self.preset)).sampling
        image = self._image(spec)
        width, height, frames = self.shape(spec, usual)
        asked_size = (width, height)
        if image is not None:
            width, height = video_size(spec, image.size, asked_size, self.fit, exact_official=self.exact_official)
        latent_shape = spec.latent_shape(width, height, frames)
        complete = CompleteRequest(
            prompt=with_terms(self.prompt, self.terms, image=image is not None),
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
            cache=self.cache if self.cache and self.cache.is_on else None,
            lora=self.lora,
            asked=replace(self, size=asked_size),
        )
        schedule = complete.noise_schedule()  # raises now rather than during the run
        _warn_beyond_distillation(spec, complete)
        return complete if complete.cache is None else _with_checked_cache(complete, schedule, spec, sampling)

    def _noise(self, latent_shape: tuple[int, ...]) -> F32 | None:
        if self.noise is None:
            return None
        if self.noise.shape not in (latent_shape, latent_shape[1:], (math.prod(latent_shape),)):
            found = f"noise of shape {list(self.noise.shape)}"
            raise UserError(found, f"{list(latent_shape)}, the latents", "choose the --size and --frames of the noise")
        if not np.isfinite(self.noise).all():
            raise UserError("noise with NaN or infinity", "finite numbers", "save it again")
        return self.noise.astype(np.float32).reshape(latent_shape)

    def _sigmas(self, sampling: SamplingSpec) -> tuple[float, ...]:
        for option, value in (("steps", self.steps), ("shift", self.shift)):
            if sampling.sigmas and value is not None:
                found = f"{option} {value:g} with preset {sampling.preset}"
                raise UserError(found, f"the preset's {len(sampling.sigmas)} noise levels", f"leave {option} out")
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
        """The preset's switch step, unless the request changes the number of steps or sets a boundary."""
        step, own_steps = sampling.switch_step, self.steps is None or self.steps == sampling.steps
        if self.boundary is not None or not own_steps or step is None:
            return None
        if not 0 <= step <= sampling.steps:
            expected = f"a step from 0 to {sampling.steps}, the preset's number of steps"
            raise UserError(f"expert switch at step {step}", expected, "export with a preset, or set --boundary")
        return step

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
        preset = PRESETS.get(sampling.preset)
        if preset and preset.distilled and set(given.values()) - {1}:
            found = f"guidance with preset {sampling.preset}"
            remedy = "leave the guidance out, or ask for the preset official, which tries it"
            raise UserError(found, "none: its checkpoints were distilled to run without", remedy)
        return {**sampling.guidance, **given}


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _warn_beyond_distillation(spec: ModelSpec, complete: "CompleteRequest") -> None:
    own = spec.sampling
    preset = PRESETS.get(own.preset)  # None if a later version wrote the bundle
    if preset and preset.distilled and (complete.steps > own.steps or complete.guided):
        guided = " with guidance" if complete.guided else ""
        what = f"{counted(complete.steps, 'step')}{guided} on a checkpoint distilled for {own.preset}"
        warn_once(f"{what} ({own.steps} steps, no guidance): the video will be poor")


def _with_checked_cache(
    complete: "CompleteRequest", schedule: Schedule, spec: ModelSpec, sampling: SamplingSpec
) -> "CompleteRequest":
    """``complete`` with its cache checked against the run, and MagCache's list filled in."""
    cache, switched = complete.cache, complete.with_switch(spec)
    assert cache is not None
    preset = PRESETS.get(sampling.preset)
    if preset and preset.distilled:
        found = f"a step cache with {sampling.preset}"
        raise UserError(found, "a model that is not distilled: it has no steps to spare", "leave the cache out")
    if cache.skip_steps == "magcache":
        skipped = magcache_steps(switched, schedule, has_image=complete.image is not None)
        cache = replace(cache, skip_steps=skipped)
    cache.check(complete.experts(spec), complete.guidance)
    return replace(complete, cache=cache)


@dataclass(frozen=True)
class CompleteRequest:
    """A request with every value set."""

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
    noise: F32 | None = field(default=None, compare=False)  # shape latent_shape; None means the seed's
    sigmas: tuple[float, ...] = ()  # noise levels; replace those derived from steps and shift
    boundary: float | None = None  # None means the model's
    switch_step: int | None = None  # first step of the low-noise expert; replaces the boundary
    cache: Caching | None = None
    lora: str | None = None

    asked: Request = field(default_factory=Request, compare=False)  # the original request, with its size filled in

    def noise_schedule(self) -> Schedule:
        """The noise levels and timesteps. Raises UserError for steps and shift without a valid schedule."""
        return make_schedule(self.solver, self.steps, self.shift, self.schedule, self.sigmas)

    def initial_noise(self) -> F32:
        """The given noise, or the values that torch's CPU generator draws for the seed; float32 of ``latent_shape``."""
        return standard_normal(self.latent_shape, self.seed) if self.noise is None else self.noise

    def with_switch(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with this request's boundary and switch step."""
        boundary = _or(self.boundary, spec.sampling.boundary)
        return replace(spec, sampling=replace(spec.sampling, boundary=boundary, switch_step=self.switch_step))

    def experts(self, spec: ModelSpec) -> list[str]:
        """The expert of every step."""
        switched = self.with_switch(spec)
        return [switched.expert_at(t, step) for step, t in enumerate(self.noise_schedule().timesteps.tolist())]

    def as_decided(self, skipped: Sequence[int], late: Sequence[int]) -> "CompleteRequest":
        """The request with its cache as the lists of a run, which repeat it: steps skipped, guidance extrapolated."""
        if self.cache is None:
            return self
        skip_steps = tuple(skipped) if self.cache.skips else None
        late_cfg = None if self.cache.late_cfg is None else tuple(late)
        return replace(self, cache=replace(self.cache, skip_steps=skip_steps, late_cfg=late_cfg))

    def sampler(self, spec: ModelSpec) -> Sampler:
        """A new sampler for one run of this request."""
        schedule, cache = self.noise_schedule(), None
        if self.cache is not None:
            keeps_first = spec.takes.clean_first_frame and self.image is not None
            sigmas = schedule.sigmas[:-1].tolist()
            unguided = [name for name, scale in self.guidance.items() if scale == 1]
            experts = self.experts(spec)
            cache = StepCache(self.cache, sigmas, experts, unguided=unguided, clean_first_frame=keeps_first)
        return Sampler(schedule, make_solver(self.solver, schedule, self.seed), self.guidance, cache)

    def part(self, spec: ModelSpec, steps: range) -> tuple[ModelSpec, Sampler]:
        """``spec`` and a sampler for these steps of the run alone, in which they count from 0.

        Raises:
            UserError: they are not steps of the run, or the request has a step cache.
        """
        whole, switched = self.noise_schedule(), self.with_switch(spec)
        if not 0 <= steps.start < steps.stop <= whole.steps:
            found = f"steps {steps.start} to {steps.stop} of {whole.steps}"
            raise UserError(found, "a first step before the last one", "choose others")
        if self.cache is not None:
            raise UserError("a step cache for part of a run", "a whole run", "leave the cache out")
        schedule = Schedule(whole.sigmas[steps.start : steps.stop + 1], whole.timesteps[steps.start : steps.stop])
        if (switch := self.switch_step) is not None:
            switched = replace(switched, sampling=replace(switched.sampling, switch_step=max(0, switch - steps.start)))
        return switched, Sampler(schedule, make_solver(self.solver, schedule, self.seed), self.guidance)

    @property
    def video(self) -> Video:
        return self.width, self.height, self.frames

    @property
    def guided(self) -> bool:
        """True if any step needs the unconditional pass."""
        return any(value != 1 for value in self.guidance.values())
