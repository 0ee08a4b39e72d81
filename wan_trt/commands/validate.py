"""``wan-trt validate``: engines beside the PyTorch reference, or precisions beside float32 on a model of its own."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wan22.errors import UserError
from wan_trt.arguments import (
    ExactOfficial,
    ExpertGuidance,
    Fit,
    Frames,
    Gate,
    Guidance,
    LastImage,
    ListGates,
    NegativePrompt,
    Preset,
    ReferenceDevice,
    Residency,
    Schedule,
    Seed,
    Shift,
    Size,
    Solver,
    Steps,
    by_expert,
    seeds_of,
    size_of,
)
from wan_trt.console import bars, command_line, console

if TYPE_CHECKING:
    from validate import ValidateOptions

Engines = Annotated[Path | None, typer.Argument(help="Engine bundle, or the ONNX bundle.", show_default=False)]
Checkpoint = Annotated[str | None, typer.Argument(help="The checkpoint it was exported from.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the report, HTML and JSON.")]
PrecisionStudy = Annotated[
    bool,
    typer.Option(
        "--precision-study", help="Compare precisions on a small model with real magnitudes; takes no engines."
    ),
]
Model = Annotated[str | None, typer.Option(help="Whose small model a precision study makes; ti2v-5b.")]
Prompt = Annotated[str | None, typer.Option(help="Prompt of the compared run.")]
Image = Annotated[Path | None, typer.Option(help="Image to start from (I2V, TI2V); a built-in picture unless given.")]
Prompts = Annotated[Path | None, typer.Option(help='Compare several: one a line, or {"prompt": ..., "image": ...}.')]
Seeds = Annotated[str | None, typer.Option(help="Every prompt with each of these: 0,1,10-12.")]
Bench = Annotated[Path | None, typer.Option(help="JSON of wan-trt bench, for the report and its gates.")]
Calls = Annotated[Path | None, typer.Option(help="Folder for one call of every engine, to be read by polygraphy run.")]
OfficialRepo = Annotated[
    Path | None, typer.Option(help="A clone of Wan-Video/Wan2.2, to compare with its code as well.")
]

STUDY_STEPS = 4
STUDIED_WITH = ("precision_study", "output", "model", "steps", "seed")  # the options that a study heeds


def run(
    engines: Engines = None,
    checkpoint: Checkpoint = None,
    output: Output = Path("report"),
    precision_study: PrecisionStudy = False,
    model: Model = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    size: Size = None,
    frames: Frames = None,
    image: Image = None,
    last_image: LastImage = None,
    fit: Fit = "official",
    exact_official: ExactOfficial = False,
    preset: Preset = None,
    steps: Steps = None,
    seed: Seed = 0,
    shift: Shift = None,
    guidance_high_noise: ExpertGuidance = None,
    guidance_low_noise: ExpertGuidance = None,
    guidance: Guidance = None,
    solver: Solver = None,
    schedule: Schedule = "official",
    prompts: Prompts = None,
    seeds: Seeds = None,
    gate: Gate = None,
    list_gates: ListGates = False,
    bench: Bench = None,
    calls: Calls = None,
    residency: Residency = "auto",
    reference_device: ReferenceDevice = "auto",
    official_repo: OfficialRepo = None,
) -> int:
    """Prove that the engines compute what PyTorch computes. Exit code 1 when a check fails or a gate is missed.

    With --precision-study: what each precision costs in accuracy, exit code 1 when one that can be exported collapses.
    """
    if list_gates:
        return _list_gates()
    if precision_study:
        _refuse_others(locals())
        return _study(output, model or "ti2v-5b", steps, seed)
    if engines is None or checkpoint is None:
        raise UserError("no ENGINES and CHECKPOINT", "both, or --precision-study", "see wan-trt validate --help")
    if model is not None:
        raise UserError("--model beside engines", "the engines' own", "leave it out, or add --precision-study")
    fixed, several = size_of(size), seeds_of(seeds)
    from validate import ValidateOptions

    options = ValidateOptions(
        prompt, negative_prompt, fixed, frames, image=image, last_image=last_image, fit=fit,
        exact_official=exact_official, seed=seed, preset=preset, steps=steps, shift=shift, guidance=guidance,
        guidance_of=by_expert(guidance_high_noise, guidance_low_noise), solver=solver, schedule=schedule,
        prompts=prompts, seeds=several, residency=residency, reference_device=reference_device,
        official_repo=official_repo, calls=calls, gate=gate, bench=bench, command=command_line(),
    )  # fmt: skip
    return _compare(engines, checkpoint, output, options)


def _compare(engines: Path, checkpoint: str, output: Path, options: "ValidateOptions") -> int:
    from validate import validate

    with bars() as progress:
        report = validate(engines, checkpoint, output, options, progress)
    console.print(report.table())
    for verdict in report.verdicts:
        console.print(f"{'[green]✓[/]' if verdict else '[red]✗[/]'} gate {verdict}")
    if not_judged := report.attached.not_judged:
        console.print(f"gates: {not_judged}", markup=False)
    if len(report.cases) > 1:
        worst = report.worst_case
        console.print(f"{len(report.cases)} cases; the worst is {worst.number}: ", end="")
        console.print(worst.command, markup=False)
    console.print(f"{report.summary()}: {output / 'report.html'}", markup=False)
    return 0 if report else 1


def _refuse_others(given: Mapping[str, object]) -> None:
    """What a precision study has no use for must not seem to have been heard."""
    for name, parameter in inspect.signature(run).parameters.items():
        if name not in STUDIED_WITH and given[name] != parameter.default:
            told = name.upper() if name in ("engines", "checkpoint") else f"--{name.replace('_', '-')}"
            raise UserError(f"{told} beside --precision-study", "a study of its own model", f"leave {told} out")


def _study(output: Path, model: str, steps: int | None, seed: int) -> int:
    from validate.study import StudyOptions, precision_study

    options = StudyOptions(model, steps=STUDY_STEPS if steps is None else steps, seed=seed, command=command_line())
    with bars() as progress:
        study = precision_study(options, output, progress)
    console.print(study.table())
    for sentence in study.sentences:
        console.print(f"- {sentence}")
    console.print(f"[dim]{output / 'study.html'}[/]")
    return 0 if study else 1


def _list_gates() -> int:
    from validate.report.worst import known

    for name in known():
        print(name)
    return 0
