"""The options of a validation."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.built_for import default_video, fill_defaults
from runtime.request import CompleteRequest, Request
from validate.reference.device import Choice
from validate.sample_image import picture_for
from wan22.bundle import MANIFEST, Manifest
from wan22.errors import UserError
from wan22.residency import ResidencyChoice

PROMPT = "A red fox runs through fresh snow at sunrise, 一只红狐狸在雪地里奔跑"


@dataclass(frozen=True)
class ValidateOptions:
    """The runs to compare, the references and the report."""

    request: Request = field(default_factory=Request)  # see :func:`with_samples`
    # for several runs
    prompts: Path | None = None  # replaces prompt and image, see :func:`runtime.prompts.read_prompts`
    seeds: tuple[int, ...] = ()  # replaces the request's seed
    # memory
    residency: ResidencyChoice = "auto"  # the engines that stay loaded
    # the references
    reference_device: Choice = "auto"
    official_repo: Path | None = None  # folder of the official code, the second reference; see :func:`official_wheel`
    calls: Path | None = None  # folder for the first call of every engine, see :mod:`validate.ladder.polygraphy_files`
    # for the report
    gate: Path | None = None  # TOML of thresholds, see :mod:`validate.gate`
    bench: Path | None = None  # JSON of ``wan-trt bench``
    command: str = ""
    blocks: BlockOptions = BLOCKS_AS_FIT  # where the weights of transformers in blocks are
    lora: tuple[str, Path] | None = None  # name and folder of a weight set for the engines' slots
    overwrite: bool = False  # an earlier report in the folder may be replaced


def check_no_report(*files: Path, overwrite: bool) -> None:
    """Refuse to write into a bundle, and to replace an earlier report without ``overwrite``. Raises UserError."""
    for folder in {path.parent for path in files}:
        if (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is a bundle", "a folder of its own for the report", "choose another")
    for path in () if overwrite else files:
        if path.exists():
            raise UserError(f"{path} exists", "a folder without a report", "choose another or add --overwrite")


def official_wheel() -> Path:
    """The folder into which ``make official`` installs the official code, beside the environment that runs.

    Raises:
        UserError: it is not there.
    """
    environment = Path(sys.prefix).with_name(".venv-official")
    found = sorted(environment.glob("lib/python*/site-packages/wan"))
    if not found:
        raise UserError(
            f"no package wan in {environment}", "the official code", "make official, or --official-repo CLONE"
        )
    return found[-1].parent


def with_samples(request: Request, manifest: Manifest) -> Request:
    """Fill in the size, the frames, a built-in prompt and, if the model takes one, a built-in image.

    Raises:
        UserError: the model does not support the size.
    """
    width, height, frames = request.shape(manifest.spec, default_video(manifest))
    manifest.spec.check_size(width, height)  # before an image of this shape is drawn
    needs_image = request.image is None and manifest.spec.takes.image != "no"
    return replace(
        request,
        prompt=PROMPT if request.prompt is None else request.prompt,
        size=(width, height),
        frames=frames,
        image=picture_for((width, height)) if needs_image else request.image,
    )


def complete_request(request: Request, manifest: Manifest) -> CompleteRequest:
    """The request that both sides run, complete for the bundle of ``manifest``.

    Raises:
        UserError: the model or the bundle's shapes do not allow the request.
    """
    return fill_defaults(with_samples(request, manifest), manifest)
