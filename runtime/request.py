"""What a user asks a pipeline for, and its completion with the model's defaults."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from runtime.image import open_image
from runtime.image_condition import Fit, video_size
from runtime.schedule import Convention, SolverName, make_schedule
from wan22.errors import UserError
from wan22.memory import Video
from wan22.specs import NEGATIVE_PROMPT, ModelSpec, Task

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST_GUIDANCE = 100


@dataclass(frozen=True)
class Preset:
    """Sampling settings that a distilled LoRA was trained for."""

    solver: SolverName
    steps: int
    shift: float
    guidance: float | None  # of every expert; None: the model's own


# Wan2.2-Lightning: timesteps 1000, 937.5, 833.3, 625, no unconditional pass.
PRESETS: Mapping[str, Preset] = {"lightning": Preset("euler", steps=4, shift=5.0, guidance=1.0)}


@dataclass(frozen=True)
class Request:
    """One video. ``None`` means the preset's or else the model's default; :meth:`completed` fills it in."""

    prompt: str
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
    preset: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: dict[str, float] = field(default_factory=dict)  # by expert name; 1 skips the unconditional pass
    solver: SolverName | None = None
    schedule: Convention = "official"

    def completed(self, spec: ModelSpec, video: Video | None = None) -> "CompleteRequest":
        """The request with images opened and every default filled in.

        Args:
            spec: the model.
            video: width, height and frames where the request states none; the model's default unless given.

        Raises:
            UserError: an image where none belongs or none where one does, a size, frames, guidance or preset that the
                model cannot have, steps and a shift that make no schedule.
        """
        preset, image = self._preset(spec), self._image(spec)
        *usual, usual_frames = video or (*spec.sampling.sizes[0], spec.sampling.frames)
        wanted = self.size or (usual[0], usual[1])
        if image is not None:
            wanted = video_size(spec, image.size, wanted, self.fit, exact_official=self.exact_official)
        frames = _or(self.frames, usual_frames)
        latent_shape = spec.latent_shape(*wanted, frames)
        complete = CompleteRequest(
            prompt=self.prompt,
            negative_prompt=_or(self.negative_prompt, NEGATIVE_PROMPT),
            width=wanted[0],
            height=wanted[1],
            frames=frames,
            latent_shape=latent_shape,
            image=image,
            last_image=None if self.last_image is None else open_image(self.last_image),
            fit=self.fit,
            seed=self.seed,
            steps=_or(self.steps, preset.steps),
            shift=_or(self.shift, preset.shift),
            guidance=self._guidance(spec, preset),
            solver=_or(self.solver, preset.solver),
            schedule=self.schedule,
        )
        make_schedule(complete.solver, complete.steps, complete.shift, complete.schedule)  # refused now, not later
        return complete

    def _preset(self, spec: ModelSpec) -> Preset:
        if self.preset is None:
            return Preset("unipc", spec.sampling.steps, spec.sampling.shift, None)
        if self.preset not in PRESETS:
            raise UserError(f"preset {self.preset!r}", f"one of {', '.join(PRESETS)}", "name one of them")
        if spec.task == Task.TI2V:
            log.warning("no %s LoRA is known for %s; without one the video will be poor", self.preset, spec.name)
        return PRESETS[self.preset]

    def _image(self, spec: ModelSpec) -> Image.Image | None:
        if self.image is None and spec.task == Task.I2V:
            raise UserError(f"no image for {spec.name}", "an image to start from", "give one with --image")
        if self.image is not None and spec.task == Task.T2V:
            raise UserError(f"an image for {spec.name}", "text only", "leave it out, or use an I2V or TI2V model")
        if self.last_image is not None and spec.task != Task.I2V:
            raise UserError(f"a last image for {spec.name}", "an I2V model", "leave it out")
        return None if self.image is None else open_image(self.image)

    def _guidance(self, spec: ModelSpec, preset: Preset) -> dict[str, float]:
        for name, value in self.guidance.items():
            if name not in spec.experts:
                raise UserError(f"guidance for {name!r}", f"one of {', '.join(spec.experts)}", "name an expert")
            if not 0 <= value <= MOST_GUIDANCE:
                expected = f"a finite number from 0 to {MOST_GUIDANCE}"
                raise UserError(f"guidance {value} for {name}", expected, "the models use 3 to 5; 1 means no guidance")
        if preset.guidance is None:
            return {**spec.sampling.guidance, **self.guidance}
        return {**dict.fromkeys(spec.experts, preset.guidance), **self.guidance}


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


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

    @property
    def guided(self) -> bool:
        """Some step needs the unconditional pass."""
        return any(value != 1 for value in self.guidance.values())
