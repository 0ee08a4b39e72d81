"""Both sides of a comparison, and everything they computed for it so far.

Every tensor is computed once, when a rung first needs it. A run of ours that stops at a NaN ends there and says so; the
steps it did make still count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from PIL import Image

from runtime.denoise import Step
from runtime.request import CompleteRequest
from validate.ladder import thresholds
from validate.ladder.engines_side import Ours
from validate.ladder.metrics import Metrics, compare
from validate.ladder.row import InPrecision, Row
from validate.ladder.thresholds import Thresholds
from validate.reference.official import Official, makes
from validate.reference.parts import F32
from validate.reference.reference import NOTHING, Given, ImageCondition, Reference
from validate.reference.whole_run import ReferenceStep, run
from wan22.errors import NonFiniteError
from wan22.progress import Progress
from wan22.specs import Precision

Watched = TypeVar("Watched")


@dataclass(frozen=True)
class Sides:
    """Who computes. ``lowered`` is the reference in the precision of ours, where that is not float32."""

    ours: Ours
    reference: Reference
    lowered: Reference | None = None
    official: Official | None = None  # where the user has a clone


class Climb:
    """What the rungs of the ladder stand on. ``limits`` are those of every component and of the whole "run"."""

    def __init__(
        self, sides: Sides, request: CompleteRequest, limits: dict[str, Thresholds], progress: Progress
    ) -> None:
        self.sides, self.request, self.limits = sides, request, limits
        self.ours, self.reference, self.lowered = sides.ours, sides.reference, sides.lowered
        self.spec = sides.reference.spec
        self._progress = progress
        self.stopped = ""  # why our run ended early

    @property
    def prompts(self) -> dict[str, str]:
        """What is encoded, by name; a run without guidance has no negative prompt."""
        negative = {"negative prompt": self.request.negative_prompt} if self.request.guided else {}
        return {"prompt": self.request.prompt, **negative}

    @cached_property
    def text(self) -> dict[str, F32]:
        """The reference's embeddings ``[1, 512, width]`` by the name of the prompt."""
        encode = self.reference.embeddings
        return {name: encode(self.reference.token_ids(text)) for name, text in self.prompts.items()}

    @property
    def images(self) -> dict[str, Image.Image]:
        """The request's, by name."""
        named = {"first image": self.request.image, "last image": self.request.last_image}
        return {name: image for name, image in named.items() if image is not None}

    @cached_property
    def pixels(self) -> dict[str, F32]:
        """The reference's ``[1, 3, H, W]`` by the name of the image."""
        size, fit = (self.request.width, self.request.height), self.request.fit
        return {name: self.reference.pixels(image, size, fit) for name, image in self.images.items()}

    @cached_property
    def condition(self) -> ImageCondition:
        """The reference's; only where there is an image."""
        return self.reference.condition(self.pixels["first image"], self.request.frames, self.pixels.get("last image"))

    @property
    def given(self) -> Given:
        """What the reference's transformer is given of the image; nothing without one."""
        return self.condition.given if self.images else NOTHING

    @cached_property
    def our_given(self) -> Given:
        return self.ours.given(self.request)

    @cached_property
    def without_image(self) -> "Climb":
        """The text to video that a model for both makes of the same request."""
        request = replace(self.request, image=None, last_image=None)
        other = Climb(self.sides, request, self.limits, self._progress)
        other.text = self.text
        return other

    def precision_of(self, component: str) -> Precision:
        return Precision.FP32 if self.lowered is None else self.lowered.precision_of(component)

    def in_precision(
        self,
        component: str,
        compared: tuple[F32, F32],
        compute: Callable[[Reference], F32],
        signal_range: float | None = None,
    ) -> InPrecision | None:
        """What the precision of ``component`` costs by itself, where it is not float32.

        ``compared`` are ours and the reference's in float32, ``compute`` makes the same of another reference.
        """
        precision = self.precision_of(component)
        if self.lowered is None or precision is Precision.FP32:
            return None
        (ours, exact), theirs = compared, compute(self.lowered)
        alone, between = (compare(*pair, signal_range=signal_range) for pair in ((theirs, exact), (ours, theirs)))
        return InPrecision(precision, alone, between)

    @cached_property
    def reference_steps(self) -> list[ReferenceStep]:
        text, negative = self.text["prompt"], self.text.get("negative prompt")
        steps = run(self.reference, self.request, text, negative, self.given)
        return list(self._watched(steps, "PyTorch run"))

    @cached_property
    def lowered_steps(self) -> list[ReferenceStep]:
        """The reference's run in the precision of ours, from its own embeddings; only where there is one."""
        lowered = self.lowered
        assert lowered is not None
        text = {name: lowered.embeddings(lowered.token_ids(prompt)) for name, prompt in self.prompts.items()}
        steps = run(lowered, self.request, text["prompt"], text.get("negative prompt"), self.given)
        return list(self._watched(steps, f"PyTorch run, {self.precision_of('run')}"))

    @property
    def official(self) -> Official:
        """Asked by the rungs of :mod:`validate.ladder.official` alone, which are climbed where there is one."""
        assert self.sides.official is not None
        return self.sides.official

    @property
    def official_runs(self) -> bool:
        """Whether the official code can make the requested run."""
        return makes(self.request)

    @cached_property
    def official_text(self) -> dict[str, F32]:
        encode = self.official.embeddings
        return {name: encode(self.official.token_ids(text)) for name, text in self.prompts.items()}

    @cached_property
    def official_steps(self) -> list[ReferenceStep]:
        text, negative = self.official_text["prompt"], self.official_text.get("negative prompt")
        return list(self._watched(self.official.run(self.request, text, negative, self.given), "official run"))

    @cached_property
    def our_steps(self) -> list[Step]:
        """As many as were made; ``stopped`` says why some are missing."""
        steps: list[Step] = []
        try:
            steps.extend(self._watched(self.ours.run(self.request), "engine run"))
        except NonFiniteError as error:
            self.stopped = str(error)
        return steps

    @property
    def latents(self) -> F32:
        """The reference's finished latents ``[1, z, T, h, w]``."""
        return self.reference_steps[-1].after

    @cached_property
    def our_decode(self) -> F32:
        """Frames ``[1, 3, F, H, W]`` that our VAE makes of the reference's latents."""
        return self.ours.decode(self.latents)

    @cached_property
    def reference_frames(self) -> F32:
        return self.reference.decode(self.latents)

    @cached_property
    def lowered_decode(self) -> F32:
        """The reference's latents, decoded by the reference in the precision of ours."""
        assert self.lowered is not None
        return self.lowered.decode(self.latents)

    @cached_property
    def lowered_frames(self) -> F32:
        """The video of the reference's run in the precision of ours."""
        assert self.lowered is not None
        return self.lowered.decode(self.lowered_steps[-1].after)

    @cached_property
    def our_frames(self) -> F32 | None:
        """Our video from prompt to pixels, None when the run stopped on the way."""
        steps = self.our_steps
        return None if self.stopped else self.ours.decode(steps[-1].latents)

    def _watched(self, steps: Iterator[Watched], task: str) -> Iterator[Watched]:
        for done, step in enumerate(steps, 1):
            self._progress(task, done, self.request.steps, "steps")
            yield step


def solved(name: str, climb: Climb, steps: Sequence[ReferenceStep]) -> Row:
    """Our solver on the velocities of another run, which leaves no room for the transformer's error.

    Of all steps the one where both are farthest apart; a step that cannot be compared is farther than any.
    """
    velocities = (step.velocity for step in steps)
    ours = climb.ours.solved(climb.request, steps[0].before, velocities, climb.given.first_frame)
    compared = [compare(latents, step.after) for latents, step in zip(ours, steps, strict=True)]
    worst = max(range(len(steps)), key=lambda index: _apart(compared[index]))
    note = f"{climb.request.solver}, farthest after step {worst + 1} of {len(steps)}"
    return Row(name, "sampler", compared[worst], thresholds.SOLVER, note)


def _apart(metrics: Metrics) -> float:
    return float("inf") if metrics.problem else metrics.relative_l2
