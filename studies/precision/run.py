"""The error of each precision, measured on a small twin with the real model's magnitudes, without GPU and checkpoint.

Every variant is the graph that an export of that precision writes, computed on the CPU. Each yields two numbers: the
error of single velocities at the latents of the float32 run, per step, with the prompt; and the distance of the final
latents of its run, including guidance and solver. Random weights make the first a hard test: no direction is favoured,
so rounding errors hardly cancel, and four blocks have little residual stream to dilute them. Errors of a trained model
can only be measured on that model.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from export.graphs.taps import Tapped
from export.precisions import LINEARS
from runtime.schedule import Schedule, make_schedule
from studies.precision.attention import TOKENS, attention_errors
from studies.precision.outliers import INPUTS, WEIGHTS, Range
from studies.precision.page import write_study
from studies.precision.result import Magnitude, PartError, Statistic, Study
from studies.precision.sampling import ReferenceRun, VariantComparison
from studies.precision.twin import Twin, TwinSize, make_twin
from studies.precision.variants import BFLOAT, VARIANTS, open_noted, parts
from wan22.errors import UserError
from wan22.files import claim
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec, spec_named

Counted = TypeVar("Counted")
HEAD, NARROWEST = 128, 256


@dataclass(frozen=True)
class StudyOptions:
    model: str = "ti2v-5b"  # the model to make a twin of
    size: TwinSize = field(default_factory=TwinSize)
    steps: int = 4
    seed: int = 0
    attention_tokens: tuple[int, ...] = TOKENS
    linears: tuple[str, ...] = LINEARS  # kinds to quantise alone
    command: str = ""


def precision_study(options: StudyOptions, folder: Path, progress: Progress = silent) -> Study:
    """Run the study and write ``study.json`` and ``study.html`` into ``folder``.

    Raises:
        UserError: the model is unknown, the size or number of steps is invalid, or ``folder`` is not writable.
    """
    spec = _check(options)
    with claim(folder / "study.json", "the study") as claimed:
        study = _run_study(spec, options, progress)
        write_study(study, claimed)
    return study


def _run_study(spec: ModelSpec, options: StudyOptions, progress: Progress) -> Study:
    meter = _Meter(progress, 4 + len(VARIANTS) + len(parts(options.linears)))
    schedule = make_schedule("unipc", options.steps, spec.sampling.shift)
    twin = meter.count(make_twin(spec, options.size, schedule, options.seed))
    reference, beforehand = (meter.count(ReferenceRun(twin, given, schedule)) for given in (twin.judged, twin.measured))
    measured = {expert: beforehand.calibration(twin, expert) for expert in twin.weights}
    comparison = VariantComparison(twin, schedule, reference, measured)
    noted = {expert: open_noted(BFLOAT, twin.spec.dit, weights) for expert, weights in twin.weights.items()}
    results = []
    for variant in VARIANTS:
        results.append(meter.count(comparison.result(variant, noted if variant is BFLOAT else None)))
    return Study(
        facts=_facts(options, twin, schedule),
        timesteps=tuple(schedule.timesteps.tolist()),
        results=tuple(results),
        parts=tuple(PartError(part.name, meter.count(comparison.first_error(part))) for part in parts(options.linears)),
        magnitudes=_magnitudes(noted),
        statistics=_statistics(twin, reference),
        attention=meter.count(tuple(attention_errors(options.seed, options.attention_tokens))),
    )


def _check(options: StudyOptions) -> ModelSpec:
    size, spec = options.size, spec_named(options.model)
    if size.width < NARROWEST or size.width % HEAD:
        raise UserError(f"width {size.width}", f"a multiple of {HEAD}, at least {NARROWEST}", "use 512 or 1024")
    if size.layers < 1 or size.tokens < 1 or any(side % 2 for side in size.latent[1:]):
        found = f"{size.layers} layers, latents {size.latent}"
        raise UserError(found, "at least one layer and one token, and even sides", "correct the size")
    timesteps = make_schedule("unipc", options.steps, spec.sampling.shift).timesteps.tolist()
    if idle := set(spec.experts) - {spec.expert_at(timestep) for timestep in timesteps}:
        raise UserError(f"{options.steps} steps, none by {min(idle)}", "steps of every expert", "use more --steps")
    return spec


def _facts(options: StudyOptions, twin: Twin, schedule: Schedule) -> dict[str, str]:
    dit, size = twin.spec.dit, options.size
    heads = f"{dit.heads} heads of {dit.head_width}"
    shape = f"{dit.layers} blocks, width {dit.width}, feed-forward {dit.ffn_width}, {heads}"
    frames, rows, columns = size.latent
    guidance = ", ".join(f"{scale:g} ({expert})" for expert, scale in twin.spec.sampling.guidance.items())
    return {
        "model": f"{twin.spec.name}: {shape}; random weights, seed {options.seed}",
        "input": f"latents of {frames} x {rows} x {columns}, {size.tokens} tokens; 512 rows of text",
        "run": f"{schedule.steps} steps, UniPC, shift {twin.spec.sampling.shift:g}, guidance {guidance}",
        "command": options.command,
    }


# -- magnitudes


def _magnitudes(noted: Mapping[str, Tapped]) -> tuple[Magnitude, ...]:
    found = []
    for expert, tapped in noted.items():
        blocks: dict[int, dict[str, float]] = {}
        for label, largest in tapped.largest.items():
            block, _, place = label.partition("/")
            blocks.setdefault(int(block), {})[place] = largest
        for number, places in blocks.items():
            residual = places.pop("residual")
            where = max(places, key=places.__getitem__)
            found.append(Magnitude(expert, number, places[where], where, residual))
    return tuple(found)


def _statistics(twin: Twin, reference: ReferenceRun) -> tuple[Statistic, ...]:
    inputs: dict[str, list[float]] = {kind: [] for kind in INPUTS}
    matrices: dict[str, list[float]] = {kind: [] for kind in WEIGHTS}
    for expert, weights in twin.weights.items():
        for name, largest in reference.largest(expert).items():
            if (kind := name.split(".", 2)[2]) in inputs:
                inputs[kind].append(largest)
                matrices[kind].append(float(np.abs(weights[f"{name}.weight"]).max()))
    return (
        *(Statistic(f"input of {kind}", real, _range(inputs[kind])) for kind, real in INPUTS.items()),
        *(Statistic(f"weight of {kind}", real, _range(matrices[kind])) for kind, real in WEIGHTS.items()),
    )


def _range(values: list[float]) -> Range:
    return Range(min(values), statistics.median(values), max(values))


class _Meter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress("precision study", 0, total, "runs")

    def count(self, result: Counted) -> Counted:
        self._done += 1
        self._progress("precision study", self._done, self._total, "runs")
        return result
