"""A validation: from engines and checkpoint to a report."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from runtime.pipeline import Pipeline
from runtime.request import CompleteRequest
from runtime.weight_sets import WeightSets
from validate.cases import Case, cases_of
from validate.ladder.onnx_side import how_made, open_for_comparison
from validate.ladder.polygraphy_files import check_calls
from validate.options import ValidateOptions, check_no_report, complete_request
from validate.reference.checkpoint import open_same_model
from validate.reference.device import Device, Residence, catch_out_of_memory, reference_device
from validate.report.conditions import facts
from wan22.bundle import Manifest, open_bundle
from wan22.files import claim
from wan22.outputs import check_no_source
from wan22.precision import Precision
from wan22.progress import Progress, silent

if TYPE_CHECKING:
    from export.checkpoint.checkpoint import Checkpoint
    from validate.ladder.comparison import Sides
    from validate.ladder.row import Row
    from validate.reference.official import Official
    from validate.report.case_report import CaseReport
    from validate.report.report import ValidationReport


def validate(
    engines: Path,
    checkpoint: Path | str,
    out: Path,
    options: ValidateOptions | None = None,
    progress: Progress = silent,
) -> "ValidationReport":
    """Climb the parity ladder and write the report's files into ``out``.

    Args:
        engines: an engine bundle, or an ONNX bundle, which then runs on the CPU.
        checkpoint: the checkpoint that the bundle was made from, a folder or a hub name.
        out: the folder of the report.
        options: the runs, the references and the report.
        progress: called during loading, runs and rungs.

    Returns:
        The report, true if every row passes and every gate holds.

    Raises:
        UserError: the engines are of another checkpoint; a folder, the request, or a file of gates, prompts or a bench
            is invalid; ``out`` has a report or is not writable; or the GPU for the reference is missing or too small.
    """
    from validate.report.extras import read_attachments
    from validate.report.report import FILES, ValidationReport, write_report

    options = options or ValidateOptions()
    check_no_source(out / "report.json", engines, options.bench, options.gate, options.prompts)
    check_no_report(*(out / name for name in FILES), overwrite=options.overwrite)
    if options.calls is not None:
        check_calls(options.calls)
    opened = open_for_comparison(engines, options.calls, options.residency, options.blocks)
    calls = claim(options.calls / "calls", "the calls") if options.calls is not None else nullcontext()
    with claim(out / "report.json", "the report") as claimed, calls, opened as pipeline:
        manifest = _with_lora(pipeline, options.lora)
        cases = cases_of(options, manifest.spec.takes.image)
        requests = [complete_request(case.options.request, manifest) for case in cases]
        for request in requests:
            pipeline.fit(request.video)
            pipeline.tokenizer.encode(request.prompt)  # refuses a prompt without content
        judged = read_attachments(pipeline.bundle, options)
        device = reference_device(options.reference_device, manifest)
        source = open_same_model(checkpoint, engines, manifest, progress)
        about = facts(manifest, source, requests, options, device)
        with official_code(options.official_repo, source) as official, catch_out_of_memory():
            sides = _sides(pipeline, source, official, device, progress)
            each = zip(cases, requests, strict=True)
            found = tuple(_compare_case(case, request, sides, manifest, progress) for case, request in each)
        report = ValidationReport(found, about, judged)
        write_report(report, claimed)
    return report


def _with_lora(pipeline: Pipeline, lora: tuple[str, Path] | None) -> Manifest:
    """Use the weight set ``lora``; return the manifest with its LoRAs, which the reference merges into its weights."""
    manifest = pipeline.bundle.manifest
    if lora is None:
        return manifest
    name, folder = lora
    pipeline.weight_sets = WeightSets(pipeline.bundle, {name: open_bundle(folder, "engines")})
    pipeline.use_weights(name)
    return replace(manifest, loras=pipeline.weight_sets.manifest(name).loras)


@contextmanager
def official_code(repo: Path | None, checkpoint: "Checkpoint") -> Iterator["Official | None"]:
    """The official code at ``repo``, or None without a clone."""
    if repo is None:
        yield None
        return
    from validate.reference.official import Official

    with Official(repo, checkpoint) as official:
        yield official


def _sides(
    pipeline: Pipeline, checkpoint: "Checkpoint", official: "Official | None", device: Device, progress: Progress
) -> "Sides":
    from validate.ladder.comparison import Sides
    from validate.ladder.engines_side import EnginesSide
    from validate.reference.reference import Reference

    precisions, residence = _precisions(pipeline.bundle.manifest), Residence(device)
    lowered = None
    if set(precisions.values()) != {Precision.FP32}:
        lowered = Reference(checkpoint, progress, precisions, residence)
    return Sides(EnginesSide(pipeline), Reference(checkpoint, progress, residence=residence), lowered, official)


def _compare_case(
    case: Case, request: CompleteRequest, sides: "Sides", manifest: Manifest, progress: Progress
) -> "CaseReport":
    """Run every rung for the first case, for the others only rungs that depend on the prompt or the seed."""
    from validate.ladder.comparison import Comparison
    from validate.ladder.rungs import rungs
    from validate.ladder.thresholds import thresholds_for
    from validate.report.case_report import CaseReport

    limits = {name: thresholds_for(precision) for name, precision in _precisions(manifest).items()}
    comparison, made = Comparison(sides, request, limits, progress), how_made(manifest)
    rows: list[Row] = []
    full = rungs(manifest.spec, official=sides.official is not None)
    ladder = [rung for rung in full if rung.of_every_case or case.number == 1]
    task = "parity ladder" if case.number == 1 else f"case {case.number}"
    for done, rung in enumerate(ladder, 1):
        started = perf_counter()
        for row in rung.rows(comparison):
            seconds = perf_counter() - started
            rows.append(replace(row, made=_how_made(row, made), case=case.number, seconds=seconds))
            started = perf_counter()
        progress(task, done, len(ladder), "rungs")
    return CaseReport.of(case, comparison, tuple(rows))


def _how_made(row: "Row", made: dict[str, str]) -> str:
    """How our side of ``row`` was made; for rows of several components, the least direct way among them."""
    several = row.component == "video" or row.step is not None or row.subject.endswith("latents")
    return max(made.values()) if several else made.get(row.component, "")


def _precisions(manifest: Manifest) -> dict[str, Precision]:
    """The precision of every component; "run", the end-to-end run, has the coarsest."""
    of = {component.name: component.precision for component in manifest.components}
    return of | {"run": min(of.values(), key=lambda precision: precision.significand)}
