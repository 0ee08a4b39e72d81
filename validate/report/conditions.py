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
from wan22.caching import Caching
from wan22.precision import Precision
from wan22.quantities import counted, video_text

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
    build, request, prompts = manifest.build, requests[0], {each.prompt for each in requests}
    higher = [f"{c.name} {c.precision}: {c.why_higher}" for c in manifest.components if c.why_higher]
    guidance = ", ".join(f"{name} {scale:g}" for name, scale in request.guidance.items())
    loras = [f"{lora.file} at {lora.strength:g} in {', '.join(lora.experts)}" for lora in manifest.loras]
    seeds = list(dict.fromkeys(str(each.seed) for each in requests))
    made = how_made(manifest)
    ways = {way: [name for name, its_way in made.items() if its_way == way] for way in dict.fromkeys(made.values())}
    its = machine()
    host = f"{its['cpu']}, {its['cores']} cores, {its['memory_gib']} GiB"
    where = str(checkpoint.folder) if checkpoint.folder != Path() else checkpoint.source.checkpoint  # or its files
    return {
        "model": manifest.spec.name,
        "precision": "; ".join((manifest.precision_text, *higher)),
        **({"target": build.target, "backend": f"{build.backend} {build.backend_version}"} if build else {}),
        "checkpoint": f"{where} ({checkpoint.source.layout} layout)",
        "fingerprint": checkpoint.source.fingerprint,
        **({"LoRAs": "; ".join(loras)} if loras else {}),
        "video": video_text(request.width, request.height, request.frames),
        **dict(_images(options, request)),
        "prompt": request.prompt if len(prompts) == 1 else f"{len(prompts)} prompts: see each case",
        "negative prompt": request.negative_prompt,
        "sampling": f"{request.solver}, {request.schedule} schedule, {counted(request.steps, 'step')}, "
        f"shift {request.shift:g}, seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}, "
        f"guidance {guidance}{_switch(request)}",
        **({"step cache": describe_cache(request.cache)} if request.cache else {}),
        "numbers": "; ".join(f"{', '.join(names)} {way}" for way, names in ways.items()),
        "reference": _reference(manifest, device),
        **dict(second_reference(options, request)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "machine": ", ".join(filter(None, (host, its["gpu"], its["system"]))),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "built by": manifest.command,
        "command": options.command,
    }


def _switch(request: CompleteRequest) -> str:
    """The switch between the experts, if the request overrides the model's."""
    if request.switch_step is not None:
        return f", {counted(request.switch_step, 'step')} of the high-noise expert"
    return "" if request.boundary is None else f", boundary {request.boundary:g}"


def describe_cache(caching: Caching) -> str:
    """The settings of a step cache in words."""
    parts = []
    if caching.skip_steps is not None:
        assert not isinstance(caching.skip_steps, str)
        parts.append(f"steps {', '.join(map(str, caching.skip_steps))} skipped")
    elif caching.easy:
        exact = f"first {caching.first_exact} and last {caching.last_exact} exact"
        parts.append(f"easy, threshold {caching.threshold:g}, {exact}, at most {caching.max_consecutive} in a row")
    parts += [caching.reuse] if caching.skips else []
    if caching.late_cfg is not None:
        late = caching.late_cfg if isinstance(caching.late_cfg, str) else ", ".join(map(str, caching.late_cfg))
        parts.append(f"late cfg {late}")
    return "; ".join(parts) + "; both sides skip the same steps"


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
            missing = (
                f"{request.solver} with the {request.schedule} schedule" if request.cache is None else "step cache"
            )
            description += f"; it has no {missing}, so its run is not compared"
        yield "second reference", description


def _images(options: ValidateOptions, request: CompleteRequest) -> Iterator[tuple[str, str]]:
    """Yield label and description of every image of the request."""
    for label, source, image in (
        ("image", options.request.image, request.image),
        ("last image", options.request.last_image, request.last_image),
    ):
        if image is not None:
            name = "built-in picture" if source is None else "an image" if isinstance(source, bytes) else str(source)
            yield label, f"{name}, {image.width}x{image.height}, {request.fit} fit"
