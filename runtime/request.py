"""What a user asks a pipeline for, and its completion with the model's defaults."""

import math
from dataclasses import dataclass, field

from runtime.schedule import Convention, SolverName
from wan22.errors import UserError
from wan22.specs import NEGATIVE_PROMPT, ModelSpec


@dataclass(frozen=True)
class Request:
    """One video. ``None`` means the model's default; :meth:`completed` fills it in."""

    prompt: str
    negative_prompt: str | None = None  # None: the official one; "": none at all
    # video
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    # sampling
    seed: int = 0
    steps: int | None = None
    shift: float | None = None
    guidance: dict[str, float] = field(default_factory=dict)  # by expert name; 1 skips the unconditional pass
    solver: SolverName = "unipc"
    schedule: Convention = "official"

    def completed(self, spec: ModelSpec) -> "CompleteRequest":
        """The request with every default of ``spec`` filled in.

        Raises:
            UserError: a size, frames or guidance that the model cannot have.
        """
        width, height = self.size or spec.sampling.sizes[0]
        frames = spec.sampling.frames if self.frames is None else self.frames
        for name, value in self.guidance.items():
            if name not in spec.experts:
                raise UserError(f"guidance for {name!r}", f"one of {', '.join(spec.experts)}", "name an expert")
            if not math.isfinite(value) or value < 0:
                raise UserError(f"guidance {value} for {name}", "a finite number, at least 0", "1 means no guidance")
        return CompleteRequest(
            prompt=self.prompt,
            negative_prompt=NEGATIVE_PROMPT if self.negative_prompt is None else self.negative_prompt,
            width=width,
            height=height,
            frames=frames,
            latent_shape=spec.latent_shape(width, height, frames),
            seed=self.seed,
            steps=spec.sampling.steps if self.steps is None else self.steps,
            shift=spec.sampling.shift if self.shift is None else self.shift,
            guidance={**spec.sampling.guidance, **self.guidance},
            solver=self.solver,
            schedule=self.schedule,
        )


@dataclass(frozen=True)
class CompleteRequest:
    """A request with nothing left open."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    latent_shape: tuple[int, int, int, int, int]  # [1, z, T, h, w]
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
