"""One validation from two folders to a report."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.image_condition import Fit
from runtime.pipeline import Pipeline
from runtime.request import CompleteRequest, Request
from runtime.schedule import Convention, SolverName
from validate.graphs import how_made, open_for_comparison
from validate.loras import with_loras
from validate.picture import picture_for
from wan22.bundle import Manifest
from wan22.errors import UserError
from wan22.progress import Progress, silent
from wan22.specs import Precision, Task

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from validate.official import Official
    from validate.report import ValidationReport
    from validate.row import Row
    from validate.thresholds import Thresholds

PROMPT = "A red fox runs through fresh snow at sunrise, 一只红狐狸在雪地里奔跑"
COARSER = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.FP8, Precision.FP8_ATTN)
LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


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
    # the second reference
    official_repo: Path | None = None  # a clone of the official code
    # for the report
    command: str = ""

    def request(self, manifest: Manifest) -> CompleteRequest:
        """Everything filled in; a bundle of fixed shapes gives its own size and frames.

        Raises:
            UserError: what the model or the shapes of the bundle do not allow.
        """
        spec, fixed = manifest.spec, manifest.size
        size = self.size or (fixed[:2] if fixed else spec.sampling.sizes[0])
        shared = {} if self.guidance is None else dict.fromkeys(spec.experts, self.guidance)
        request = Request(
            prompt=self.prompt or PROMPT,
            negative_prompt=self.negative_prompt,
            size=size,
            frames=self.frames if self.frames is not None or not fixed else fixed[2],
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
        if fixed and fixed != (made := (complete.width, complete.height, complete.frames)):
            found, expected = ("{}x{}, {} frames".format(*shape) for shape in (made, fixed))
            raise UserError(f"a video of {found}", f"{expected}, which the engines are made for", "try --fit crop")
        return complete


def validate(
    engines: Path,
    checkpoint: Path | str,
    out: Path,
    options: ValidateOptions | None = None,
    progress: Progress = silent,
) -> "ValidationReport":
    """Climbs the parity ladder and writes ``report.json`` and ``report.html`` into ``out``.

    Returns:
        The report, true when every row passed.

    Raises:
        UserError: engines of another checkpoint, a precision or model without limits, ``out`` not writable, or
            anything wrong with the folders or the request.
    """
    options = options or ValidateOptions()
    with open_for_comparison(engines) as pipeline:
        manifest = pipeline.bundle.manifest
        request = options.request(manifest)
        source = with_loras(open_same_model(checkpoint, engines, manifest, progress), manifest)
        with official_code(options.official_repo, source) as official:
            return _climb(pipeline, (source, official), request, Target(out, options), progress)


@contextmanager
def official_code(repo: Path | None, checkpoint: "Checkpoint") -> Iterator["Official | None"]:
    """The official code at ``repo``, None where there is none."""
    if repo is None:
        yield None
        return
    from validate.official import Official

    with Official(repo, checkpoint) as official:
        yield official


def open_same_model(where: Path | str, engines: Path, manifest: Manifest, progress: Progress) -> "Checkpoint":
    """The checkpoint at ``where``. Raises UserError when it is not the one the engines were made from."""
    from export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(where, progress)
    ours = (manifest.spec.name, manifest.source.fingerprint)
    theirs = (checkpoint.spec.name, checkpoint.source.fingerprint)
    if ours != theirs or manifest.spec != checkpoint.spec:
        raise UserError(
            f"{engines} was made from {ours[0]}, fingerprint {ours[1][:12]} ({manifest.source.checkpoint})",
            f"{theirs[0]}, fingerprint {theirs[1][:12]} ({where})",
            "name the checkpoint that was exported, or export this one",
        )
    return checkpoint


@dataclass(frozen=True)
class Target:
    """Where the report goes, and what was asked for, which it repeats."""

    folder: Path
    options: ValidateOptions


def _climb(
    pipeline: Pipeline,
    references: "tuple[Checkpoint, Official | None]",
    request: CompleteRequest,
    target: Target,
    progress: Progress,
) -> "ValidationReport":
    from validate.climb import Climb, Sides
    from validate.figures import filmstrip
    from validate.ladder import rungs
    from validate.ours import Ours
    from validate.reference import Reference
    from validate.report import ValidationReport, check_writable, write_report
    from validate.row import Row

    check_writable(target.folder)
    manifest, (checkpoint, official) = pipeline.bundle.manifest, references
    precisions, made = _precisions(manifest), how_made(manifest)
    lowered = Reference(checkpoint, progress, precisions) if set(precisions.values()) != {Precision.FP32} else None
    sides = Sides(Ours(pipeline), Reference(checkpoint, progress), lowered, official)
    climb = Climb(sides, request, _limits(precisions), progress)
    ladder, rows = rungs(manifest.spec, official=official is not None), list[Row]()
    for done, rung in enumerate(ladder, 1):
        rows.extend(replace(row, made=_made(row, made)) for row in rung.rows(climb))
        progress("parity ladder", done, len(ladder), "rungs")
    pictures = None if climb.our_frames is None else filmstrip(climb.our_frames, climb.reference_frames)
    report = ValidationReport(tuple(rows), facts(manifest, checkpoint, request, target.options), pictures)
    write_report(report, target.folder)
    return report


def _made(row: "Row", made: dict[str, str]) -> str:
    """How ours of ``row`` was made; what several components make together has the less direct way of them."""
    several = row.component == "video" or row.step is not None or row.subject == "latents"
    return max(made.values()) if several else made.get(row.component, "")


def _precisions(manifest: Manifest) -> dict[str, Precision]:
    """By component; what the whole chain computes, "run", has the coarsest of them."""
    of = {component.name: component.precision for component in manifest.components}
    return of | {"run": max(of.values(), key=COARSER.index)}


def _limits(precisions: dict[str, Precision]) -> dict[str, "Thresholds"]:
    """Each component is held to its own precision."""
    from validate.thresholds import thresholds_for

    return {name: thresholds_for(precision) for name, precision in precisions.items()}


def facts(
    manifest: Manifest, checkpoint: "Checkpoint", request: CompleteRequest, options: ValidateOptions
) -> dict[str, str]:
    """What was compared, by the label that the report prints it under."""
    build = manifest.build
    higher = [f"{c.name} {c.precision}: {c.why_higher}" for c in manifest.components if c.why_higher]
    guidance = ", ".join(f"{name} {scale:g}" for name, scale in request.guidance.items())
    loras = [f"{lora.file} at {lora.strength:g} in {', '.join(lora.experts)}" for lora in manifest.loras]
    return {
        "model": manifest.spec.name,
        "precision": "; ".join((str(manifest.precision), *higher)),
        "target": build.target if build else "",
        "backend": f"{build.backend} {build.backend_version}" if build else "",
        "checkpoint": f"{checkpoint.folder} ({checkpoint.source.layout} layout)",
        "fingerprint": checkpoint.source.fingerprint,
        **({"LoRAs": "; ".join(loras)} if loras else {}),
        "video": f"{request.width}x{request.height}, {request.frames} frames",
        **dict(_images(options, request)),
        "prompt": request.prompt,
        "negative prompt": request.negative_prompt,
        "sampling": f"{request.solver}, {request.schedule} schedule, {request.steps} steps, shift {request.shift:g}, "
        f"seed {request.seed}, guidance {guidance}",
        "numbers": "; ".join(f"{', '.join(names)} {way}" for way, names in _ways(manifest).items()),
        "reference": _reference(manifest),
        **({} if options.official_repo is None else {"second reference": f"the code at {options.official_repo}, fp32"}),
        "versions": ", ".join([*(f"{name} {metadata.version(name)}" for name in LIBRARIES), _python()]),
        "machine": f"{platform.system()} {platform.machine()}",
        "built by": manifest.command,
        "command": options.command,
    }


def _ways(manifest: Manifest) -> dict[str, list[str]]:
    """The components by how their numbers are made."""
    made = how_made(manifest)
    return {way: [name for name, its in made.items() if its == way] for way in dict.fromkeys(made.values())}


def _reference(manifest: Manifest) -> str:
    low = sorted({str(c.precision) for c in manifest.components if c.precision is not Precision.FP32})
    beside = f", and in {' and '.join(low)} where the bundle is" if low else ""
    return f"PyTorch in fp32 on the CPU, with the official float64 sinusoid of the timestep{beside}"


def _images(options: ValidateOptions, request: CompleteRequest) -> Iterator[tuple[str, str]]:
    """Label and description of every image of the request."""
    for label, source, image in (
        ("image", options.image, request.image),
        ("last image", options.last_image, request.last_image),
    ):
        if image is not None:
            name = "built-in picture" if source is None else "an image" if isinstance(source, bytes) else str(source)
            yield label, f"{name}, {image.width}x{image.height}, {request.fit} fit"


def _python() -> str:
    return f"Python {platform.python_version()}"
