"""What a validation is asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from runtime.built_for import check_video, default_video
from runtime.image_condition import Fit
from runtime.request import CompleteRequest, Request
from runtime.schedule import Convention, SolverName
from validate.reference.device import Choice
from validate.sample_image import picture_for
from wan22.bundle import Manifest
from wan22.memory import ResidencyChoice
from wan22.specs import Task

PROMPT = "A red fox runs through fresh snow at sunrise, 一只红狐狸在雪地里奔跑"


@dataclass(frozen=True)
class ValidateOptions:
    """The run that is compared. ``None`` means the model's default."""

    prompt: str | None = None
    negative_prompt: str | None = None
    # video
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    # image to video
    image: Path | bytes | None = None  # None: a built-in picture for models that take one
    last_image: Path | bytes | None = None
    fit: Fit = "official"
    exact_official: bool = False
    # sampling
    seed: int = 0
    preset: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None  # of every expert
    guidance_of: dict[str, float] = field(default_factory=dict)  # of one expert, over that of every
    solver: SolverName | None = None
    schedule: Convention = "official"
    # several runs
    prompts: Path | None = None  # see :func:`runtime.prompts.read_prompts`; instead of prompt and image
    seeds: tuple[int, ...] = ()  # instead of seed
    # memory
    residency: ResidencyChoice = "auto"  # what stays loaded of the engines
    # the references
    reference_device: Choice = "auto"
    official_repo: Path | None = None  # a clone of the official code, for a second one
    calls: Path | None = None  # folder for the first call of every engine, see :mod:`validate.ladder.polygraphy_files`
    # for the report
    gate: Path | None = None  # TOML of thresholds, see :mod:`validate.gate`
    bench: Path | None = None  # JSON of ``wan-trt bench``
    command: str = ""

    def request(self, manifest: Manifest) -> CompleteRequest:
        """Everything filled in, size and frames as :func:`runtime.built_for.default_video` has them.

        Raises:
            UserError: what the model or the shapes of the bundle do not allow.
        """
        spec, usual = manifest.spec, default_video(manifest)
        size = self.size or usual[:2]
        spec.check_size(*size)  # before a picture is made in its shape
        shared = {} if self.guidance is None else dict.fromkeys(spec.experts, self.guidance)
        request = Request(
            prompt=PROMPT if self.prompt is None else self.prompt,
            negative_prompt=self.negative_prompt,
            size=size,
            frames=usual[2] if self.frames is None else self.frames,
            image=picture_for(size) if self.image is None and spec.task != Task.T2V else self.image,
            last_image=self.last_image,
            fit=self.fit,
            exact_official=self.exact_official,
            seed=self.seed,
            preset=self.preset,
            steps=self.steps,
            shift=self.shift,
            guidance=shared | self.guidance_of,
            solver=self.solver,
            schedule=self.schedule,
        )
        complete = request.completed(spec)
        hint = "; with an image, --fit crop makes exactly that size" if complete.image is not None else ""
        check_video(manifest, (complete.width, complete.height, complete.frames), hint)
        return complete
