"""Both sides of a comparison and a cache of everything they have computed.

Every tensor is computed once, when a rung first needs it. If our run stops at a NaN, the reason is recorded and the
steps before it still count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from PIL import Image

from runtime.denoise import Step
from runtime.request import CompleteRequest
from validate.ladder import thresholds
from validate.ladder.engines_side import EnginesSide
from validate.ladder.metrics import compare
from validate.ladder.row import InPrecision, Row
from validate.ladder.thresholds import Thresholds
from validate.reference.official import Official
from validate.reference.parts import F32
from validate.reference.reference import NO_IMAGE, ImageCondition, ImageInputs, Reference
from validate.reference.whole_run import ReferenceStep, run
from wan22.errors import NonFiniteError
from wan22.precision import Precision
from wan22.progress import Progress

Watched = TypeVar("Watched")


@dataclass(frozen=True)
class Sides:
    """The implementations to compare. ``lowered`` is the reference in the engines' precision; None for float32."""

    ours: EnginesSide
    reference: Reference
    lowered: Reference | None = None
    official: Official | None = None  # None without a clone


class Comparison:
    """The cached tensors that the rungs compare. ``limits`` are by component; "run" is the end-to-end run."""

    def __init__(
        self, sides: Sides, request: CompleteRequest, limits: dict[str, Thresholds], progress: Progress
    ) -> None:
        self.sides, self.request, self.limits = sides, request, limits
        self.ours, self.reference, self.lowered = sides.ours, sides.reference, sides.lowered
        self.spec = sides.reference.spec
        self._progress = progress
        self.stop_reason = ""  # why our run ended early; empty if it did not

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts to encode, by name. A run without guidance has no negative prompt."""
        negative = {"negative prompt": self.request.negative_prompt} if self.request.guided else {}
        return {"prompt": self.request.prompt, **negative}

    @cached_property
    def text(self) -> dict[str, F32]:
        """The reference's embeddings ``[1, 512, width]`` by the name of the prompt."""
        encode = self.reference.embeddings
        return {name: encode(self.reference.token_ids(text)) for name, text in self.prompts.items()}

    @property
    def images(self) -> dict[str, Image.Image]:
        """The images of the request, by name."""
        named = {"first image": self.request.image, "last image": self.request.last_image}
        return {name: image for name, image in named.items() if image is not None}

    @cached_property
    def pixels(self) -> dict[str, F32]:
        """The reference's pixels ``[1, 3, H, W]`` by the name of the image."""
        size, fit = (self.request.width, self.request.height), self.request.fit
        return {name: self.reference.pixels(image, size, fit) for name, image in self.images.items()}

    @cached_property
    def condition(self) -> ImageCondition:
        """The reference's image condition; requires an image."""
        return self.reference.condition(self.pixels["first image"], self.request.frames, self.pixels.get("last image"))

    @property
    def image_inputs(self) -> ImageInputs:
        """The image inputs of the reference's transformer; empty without an image."""
        return self.condition.image_inputs if self.images else NO_IMAGE

    @cached_property
    def our_image_inputs(self) -> ImageInputs:
        """The image inputs that the engines compute."""
        return self.ours.image_inputs(self.request)

    @cached_property
    def without_image(self) -> "Comparison":
        """The same request without its images, for models that support text to video as well."""
        request = replace(self.request, image=None, last_image=None)
        other = Comparison(self.sides, request, self.limits, self._progress)
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
        """The error that the precision of ``component`` causes by itself; None for float32.

        ``compared`` holds our tensor and the float32 reference's; ``compute`` returns the same of another reference.
        """
        precision = self.precision_of(component)
        if self.lowered is None or precision is Precision.FP32:
            return None
        (ours, exact), theirs = compared, compute(self.lowered)
        alone, between = (compare(*pair, signal_range=signal_range) for pair in ((theirs, exact), (ours, theirs)))
        return InPrecision(precision, alone, between)

    @cached_property
    def decided(self) -> CompleteRequest:
        """The request with the steps that our run skipped as a list, which all references skip as well."""
        if self.request.cache is None:
            return self.request
        skipped = [step.index for step in self.our_steps if step.cached]
        return self.request.as_decided(skipped, [step.index for step in self.our_steps if step.late_cfg])

    @cached_property
    def reference_steps(self) -> list[ReferenceStep]:
        text, negative = self.text["prompt"], self.text.get("negative prompt")
        steps = run(self.reference, self.decided, text, negative, self.image_inputs)
        return list(self._with_progress(steps, "PyTorch run"))

    @cached_property
    def lowered_steps(self) -> list[ReferenceStep]:
        """The run of ``lowered`` from its own embeddings; requires ``lowered``."""
        lowered = self.lowered
        assert lowered is not None
        text = {name: lowered.embeddings(lowered.token_ids(prompt)) for name, prompt in self.prompts.items()}
        steps = run(lowered, self.decided, text["prompt"], text.get("negative prompt"), self.image_inputs)
        return list(self._with_progress(steps, f"PyTorch run, {self.precision_of('run')}"))

    @property
    def official(self) -> Official:
        """The official code, which only the rungs of :mod:`validate.ladder.official` use."""
        assert self.sides.official is not None
        return self.sides.official

    @cached_property
    def official_text(self) -> dict[str, F32]:
        encode = self.official.embeddings
        return {name: encode(self.official.token_ids(text)) for name, text in self.prompts.items()}

    @cached_property
    def official_steps(self) -> list[ReferenceStep]:
        text, negative = self.official_text["prompt"], self.official_text.get("negative prompt")
        steps = self.official.run(self.request, text, negative, self.image_inputs)
        return list(self._with_progress(steps, "official run"))

    @cached_property
    def our_steps(self) -> list[Step]:
        """The steps of our run; ``stop_reason`` says why some are missing."""
        steps: list[Step] = []
        try:
            steps.extend(self._with_progress(self.ours.run(self.request), "engine run"))
        except NonFiniteError as error:
            self.stop_reason = str(error)
        return steps

    @cached_property
    def exact_steps(self) -> list[Step]:
        """The steps of our run without its step cache."""
        exact = self.ours.run(replace(self.request, cache=None))
        return list(self._with_progress(exact, "engine run without step cache"))

    @cached_property
    def exact_frames(self) -> F32:
        """Our video without the step cache."""
        return self.ours.decode(self.exact_steps[-1].latents)

    @property
    def latents(self) -> F32:
        """The reference's finished latents ``[1, z, T, h, w]``."""
        return self.reference_steps[-1].after

    @cached_property
    def our_decode(self) -> F32:
        """The reference's latents decoded by our VAE, ``[1, 3, F, H, W]``."""
        return self.ours.decode(self.latents)

    @cached_property
    def reference_frames(self) -> F32:
        return self.reference.decode(self.latents)

    @cached_property
    def lowered_decode(self) -> F32:
        """The reference's latents decoded by ``lowered``."""
        assert self.lowered is not None
        return self.lowered.decode(self.latents)

    @cached_property
    def lowered_frames(self) -> F32:
        """The video of the run of ``lowered``."""
        assert self.lowered is not None
        return self.lowered.decode(self.lowered_steps[-1].after)

    @cached_property
    def our_frames(self) -> F32 | None:
        """Our video from prompt to pixels; None if the run stopped early."""
        steps = self.our_steps
        return None if self.stop_reason else self.ours.decode(steps[-1].latents)

    def _with_progress(self, steps: Iterator[Watched], task: str) -> Iterator[Watched]:
        for done, step in enumerate(steps, 1):
            self._progress(task, done, self.request.steps, "steps")
            yield step


def solver_row(name: str, comparison: Comparison, steps: Sequence[ReferenceStep]) -> Row:
    """Compare our solver with another run's on that run's velocities, so the transformer's error plays no part.

    The row is of the step with the largest distance; a step that cannot be compared counts as the largest.
    """
    velocities = (step.velocity for step in steps)
    ours = comparison.ours.solve(comparison.request, steps[0].before, velocities, comparison.image_inputs.first_frame)
    compared = [compare(latents, step.after) for latents, step in zip(ours, steps, strict=True)]
    distances = [float("inf") if metrics.problem else metrics.relative_l2 for metrics in compared]
    worst = int(np.argmax(distances))
    note = f"{comparison.request.solver}, largest distance after step {worst + 1} of {len(steps)}"
    return Row(name, "sampler", compared[worst], thresholds.SOLVER, note)
