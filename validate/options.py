"""What a validation is asked for."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.built_for import completed, default_video
from runtime.request import CompleteRequest, Request
from validate.reference.device import Choice
from validate.sample_image import picture_for
from wan22.bundle import Manifest
from wan22.residency import ResidencyChoice

PROMPT = "A red fox runs through fresh snow at sunrise, 一只红狐狸在雪地里奔跑"


@dataclass(frozen=True)
class ValidateOptions:
    """The run that is compared."""

    request: Request = field(default_factory=Request)  # see :func:`with_samples`
    # several runs
    prompts: Path | None = None  # see :func:`runtime.prompts.read_prompts`; instead of prompt and image
    seeds: tuple[int, ...] = ()  # instead of the request's seed
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


def with_samples(request: Request, manifest: Manifest) -> Request:
    """``request`` with size and frames and, where it has none, a built-in prompt, and a picture if the model takes one.

    Raises:
        UserError: a size that the model cannot have.
    """
    width, height, frames = request.shape(manifest.spec, default_video(manifest))
    manifest.spec.check_size(width, height)  # before a picture is made in its shape
    pictured = request.image is None and manifest.spec.takes.image != "no"
    return replace(
        request,
        prompt=PROMPT if request.prompt is None else request.prompt,
        size=(width, height),
        frames=frames,
        image=picture_for((width, height)) if pictured else request.image,
    )


def complete_request(request: Request, manifest: Manifest) -> CompleteRequest:
    """What both sides of a comparison run on the bundle of ``manifest``.

    Raises:
        UserError: what the model or the shapes of the bundle do not allow.
    """
    return completed(with_samples(request, manifest), manifest)
