"""Several devices against one of them, row by row: ``wan-trt validate --parallel``.

Both sides run the same request with the same engines. Where devices divide prompts or experts alone, every number is
equal; where they divide tokens or pictures, sums have another order.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from runtime.arrays import F32
from runtime.forward_inputs import forward_inputs
from runtime.pipeline import Pipeline
from runtime.request import CompleteRequest
from validate.ladder.metrics import FRAME_RANGE, compare
from validate.ladder.row import Row
from validate.ladder.thresholds import Limit, thresholds_for
from validate.options import ValidateOptions, complete_request
from wan22.bundle import Manifest, open_bundle
from wan22.errors import UserError
from wan22.parallel import Split
from wan22.precision import Precision
from wan22.progress import Progress, silent

EQUAL = Limit("max_abs", 0, "the same engines on the same inputs")
VELOCITY = Limit("relative_l2", 1e-6, "float32 sums over tokens that other devices computed")
LATENTS = Limit("relative_l2", 1e-4, "a velocity's 1e-6, times guidance and the solver's history")
FRAMES = Limit("max_abs", 1e-5, "float32 convolutions of pictures in other strips")


@dataclass(frozen=True)
class Limits:
    """What a split may change; in low precision as much as that precision itself."""

    velocity: Limit
    latents: Limit
    decode: Limit
    frames: Limit

    @classmethod
    def of(cls, split: Split, manifest: Manifest) -> "Limits":
        of = {component.name: component.precision for component in manifest.components}
        run = thresholds_for(min(of.values(), key=lambda precision: precision.significand))
        expert, vae = of[manifest.spec.experts[0]], of["vae_decoder_first"]
        velocity, latents, decode = EQUAL, EQUAL, EQUAL
        if split.ulysses > 1:
            exact = expert is Precision.FP32
            velocity = VELOCITY if exact else thresholds_for(expert).velocity
            latents = LATENTS if exact else thresholds_for(expert).latents
        if split.vae > 1:
            decode = FRAMES if vae is Precision.FP32 else thresholds_for(vae).vae
        return cls(velocity, latents, decode, run.frames if split.ulysses > 1 else decode)


@dataclass(frozen=True)
class ParallelReport:
    """True if every row passes."""

    split: str
    devices: tuple[str, ...]
    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.passed for row in self.rows)

    def table(self) -> Table:
        title = f"{self.split} on {', '.join(self.devices)} against {self.devices[0]} alone"
        table = Table("", "row", "measure", "found", "limit", title=title, title_justify="left")
        for row in self.rows:
            found, limit = row.limit.found(row.metrics), row.limit
            mark = "✓" if row.passed else "✗"
            table.add_row(mark, row.name, limit.measure, f"{found:.3g}", f"{limit.sign} {limit.value:g}")
        return table

    def summary(self) -> str:
        failed = [row.name for row in self.rows if not row.passed]
        return f"{len(self.rows) - len(failed)} of {len(self.rows)} rows pass"

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": row.name,
                "component": row.component,
                "measure": row.limit.measure,
                "found": row.limit.found(row.metrics),
                "limit": row.limit.value,
                "reason": row.limit.reason,
                "passed": row.passed,
            }
            for row in self.rows
        ]
        return {"parallel": self.split, "devices": list(self.devices), "passed": bool(self), "rows": rows}


def validate_parallel(engines: Path, options: ValidateOptions, progress: Progress = silent) -> ParallelReport:
    """Compare the devices that ``options`` name with one of them.

    Raises:
        UserError: they name one device, or the engines cannot divide the work so.
    """
    bundle, several = open_bundle(engines, "engines"), options.blocks
    alone = replace(several, parallel=None, gpus=several.gpus.split(",")[0] if several.gpus else None)
    request = complete_request(options.request, bundle.manifest)
    with ExitStack() as stack:
        group = stack.enter_context(Pipeline(bundle, residency=options.residency, blocks=several))
        if group.backend.group is None:
            raise UserError("--gpus with one device", "several to compare with one", "name them as 0,1")
        sides = {
            "group": group,
            "one": stack.enter_context(Pipeline(bundle, residency=options.residency, blocks=alone)),
        }
        rows = tuple(_rows(sides, request, Limits.of(group.split, bundle.manifest), progress))
        return ParallelReport(str(group.split), group.backend.group.names, rows)


def _rows(sides: dict[str, Pipeline], request: CompleteRequest, limits: Limits, progress: Progress) -> Iterator[Row]:
    prompts = {"prompt": request.prompt} | ({"negative prompt": request.negative_prompt} if request.guided else {})
    group, one = sides["group"], sides["one"]
    text: dict[str, F32] = {}
    for name, prompt in prompts.items():
        text[name] = one.text(prompt, allow_empty=True)
        ours = group.text(prompt, allow_empty=True)
        yield Row(f"embeddings, {name}", "text_encoder", compare(ours, text[name]), EQUAL)
    images = {name: pipeline.image_condition(request) for name, pipeline in sides.items()}
    for name, expected in images["one"].items():
        yield Row(
            f"encoded image, {name}", "vae_encoder_first", compare(images["group"][name], expected), limits.decode
        )
    runs = {name: _latents(pipeline, request, name, progress) for name, pipeline in sides.items()}
    noise, given = request.initial_noise(), images["one"]
    for expert in one.spec.experts:
        for name, rows in text.items():
            inputs = partial(forward_inputs, one.spec.dit, noise, 500.0, rows, given.get("condition"))
            found = [np.asarray(side.engine(expert)(**inputs())) for side in (group, one)]
            yield Row(f"velocity of {expert}, {name}", expert, compare(*found), limits.velocity)
    for step, (ours, theirs) in enumerate(zip(runs["group"], runs["one"], strict=True), 1):
        yield Row(f"latents after step {step}", "sampler", compare(ours, theirs), limits.latents, step=step)
    decoded = [np.concatenate(list(side.decode(runs["one"][-1])), axis=2) for side in (group, one)]
    yield Row("decode of the same latents", "vae_decoder_next", compare(*decoded), limits.decode)
    video = np.concatenate(list(group.decode(runs["group"][-1])), axis=2)
    yield Row("video", "video", compare(video, decoded[1], signal_range=FRAME_RANGE), limits.frames)


def _latents(pipeline: Pipeline, request: CompleteRequest, side: str, progress: Progress) -> list[F32]:
    """The latents after every step."""
    found = []
    for step in pipeline.denoise(request):
        found.append(step.latents.copy())
        progress({"group": "run on all devices", "one": "run on one"}[side], step.index + 1, step.total, "steps")
    return found


def write_parallel(report: ParallelReport, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report.as_json()), indent=1) + b"\n")
