"""The report's description of what was compared and how."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.request import CompleteRequest
from validate.bench.machine import machine, versions
from validate.ladder.onnx_side import how_made
from validate.options import ValidateOptions
from validate.reference.device import Device
from wan22.bundle import Manifest
from wan22.quantities import counted, video_text
from wan22.specs import Precision

if TYPE_CHECKING:
    from export.checkpoint.checkpoint import Checkpoint


def facts(
    manifest: Manifest,
    checkpoint: "Checkpoint",
    requests: Sequence[CompleteRequest],
    options: ValidateOptions,
    device: Device,
) -> dict[str, str]:
    """Describe the comparison: the label that the report prints → text.

    The ``requests`` differ only in prompt, image and seed.
    """
    build, request = manifest.build, requests[0]
    higher = [f"{c.name} {c.precision}: {c.why_higher}" for c in manifest.components if c.why_higher]
    guidance = ", ".join(f"{name} {scale:g}" for name, scale in request.guidance.items())
    loras = [f"{lora.file} at {lora.strength:g} in {', '.join(lora.experts)}" for lora in manifest.loras]
    return {
        "model": manifest.spec.name,
        "precision": "; ".join((str(manifest.precision), *higher)),
        **({"target": build.target, "backend": f"{build.backend} {build.backend_version}"} if build else {}),
        "checkpoint": f"{_where(checkpoint)} ({checkpoint.source.layout} layout)",
        "fingerprint": checkpoint.source.fingerprint,
        **({"LoRAs": "; ".join(loras)} if loras else {}),
        "video": video_text(request.width, request.height, request.frames),
        **dict(_images(options, request)),
        "prompt": _all([each.prompt for each in requests], "prompts: see each case"),
        "negative prompt": request.negative_prompt,
        "sampling": f"{request.solver}, {request.schedule} schedule, {counted(request.steps, 'step')}, "
        f"shift {request.shift:g}, {_seeds(requests)}, guidance {guidance}{_switch(request)}",
        "numbers": "; ".join(f"{', '.join(names)} {way}" for way, names in _ways(manifest).items()),
        "reference": _reference(manifest, device),
        **dict(second_reference(options, request)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "machine": _machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "built by": manifest.command,
        "command": options.command,
    }


def _all(values: Sequence[str], plural: str) -> str:
    """The value that all cases share, or how many there are."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else f"{len(different)} {plural}"


def _seeds(requests: Sequence[CompleteRequest]) -> str:
    seeds = list(dict.fromkeys(str(request.seed) for request in requests))
    return f"seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}"


def _switch(request: CompleteRequest) -> str:
    """The switch between the experts, if the request overrides the model's."""
    if request.switch_step is not None:
        return f", {counted(request.switch_step, 'step')} of the high-noise expert"
    return "" if request.boundary is None else f", boundary {request.boundary:g}"


def _machine() -> str:
    found = machine()
    host = f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
    return ", ".join(filter(None, (host, found["gpu"], found["system"])))


def _ways(manifest: Manifest) -> dict[str, list[str]]:
    """How the numbers are made → the components that are made so."""
    made = how_made(manifest)
    return {way: [name for name, its in made.items() if its == way] for way in dict.fromkeys(made.values())}


def _reference(manifest: Manifest, device: Device) -> str:
    low = sorted({str(c.precision) for c in manifest.components if c.precision is not Precision.FP32})
    also = f", and in {' and '.join(low)} where the bundle is" if low else ""
    where = "CPU" if device == "cpu" else "GPU"
    return f"PyTorch in fp32 on the {where}, with the official float64 sinusoid of the timestep{also}"


def second_reference(options: ValidateOptions, request: CompleteRequest) -> Iterator[tuple[str, str]]:
    """Yield label and description of the official code, if it is given."""
    from validate.reference.official import can_run, version_of

    if options.official_repo is not None:
        at = version_of(options.official_repo)
        description = f"the code at {options.official_repo}{at and f', {at}'}, fp32 on the CPU"
        if not can_run(request):
            description += (
                f"; it has no {request.solver} with the {request.schedule} schedule, so its run is not compared"
            )
        yield "second reference", description


def _where(checkpoint: "Checkpoint") -> str:
    """The folder of the checkpoint, or its files if they were named individually."""
    return str(checkpoint.folder) if checkpoint.folder != Path() else checkpoint.source.checkpoint


def _images(options: ValidateOptions, request: CompleteRequest) -> Iterator[tuple[str, str]]:
    """Yield label and description of every image of the request."""
    for label, source, image in (
        ("image", options.request.image, request.image),
        ("last image", options.request.last_image, request.last_image),
    ):
        if image is not None:
            name = "built-in picture" if source is None else "an image" if isinstance(source, bytes) else str(source)
            yield label, f"{name}, {image.width}x{image.height}, {request.fit} fit"
