"""``wan-trt validate``: compare engines with the PyTorch reference."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan22.errors import UserError
from wan22.outputs import check_no_source
from wan_trt import arguments as given
from wan_trt import cache_options, memory_options
from wan_trt.console import bars, command_line, console

if TYPE_CHECKING:
    from validate import ValidateOptions

Engines = Annotated[Path | None, typer.Argument(help="Engine bundle, or the ONNX bundle.", show_default=False)]
Checkpoint = Annotated[str | None, typer.Argument(help="The checkpoint it was exported from.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the report in HTML and JSON.")]
PrecisionStudy = Annotated[bool, typer.Option("--precision-study", hidden=True)]  # has moved, and its --model too
Model = Annotated[str | None, typer.Option(hidden=True)]
Prompt = Annotated[str | None, typer.Option(help="Prompt of the compared run.")]
Image = Annotated[Path | None, typer.Option(help="Image to start from (I2V, TI2V); by default a built-in one.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help='Prompts to compare: one a line, or {"prompt": ..., "image": ...}; "# " begins a comment.'),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds to run every prompt with, such as 0,1,10-12.")]
Bench = Annotated[Path | None, typer.Option(help="JSON of wan-trt bench, for the report and its gates.")]
Calls = Annotated[Path | None, typer.Option(help="Folder for one call of every engine, readable by polygraphy run.")]
Official = Annotated[bool, typer.Option("--official", help="Compare with the official code of make official as well.")]
OfficialRepo = Annotated[Path | None, typer.Option(help="The same with a clone of Wan-Video/Wan2.2.")]


@given.with_options(given.SAMPLING, cache_options.OPTIONS, memory_options.OPTIONS, given.SLOTS)
def run(
    engines: Engines = None,
    checkpoint: Checkpoint = None,
    output: Output = Path("report"),
    precision_study: PrecisionStudy = False,
    model: Model = None,
    prompt: Prompt = None,
    size: given.Size = None,
    frames: given.Frames = None,
    image: Image = None,
    last_image: given.LastImage = None,
    fit: given.Fit = "official",
    exact_official: given.ExactOfficial = False,
    seed: given.Seed = 0,
    noise: given.Noise = None,
    schedule: given.Schedule = None,
    prompts: Prompts = None,
    seeds: Seeds = None,
    gate: given.Gate = None,
    list_gates: given.ListGates = False,
    bench: Bench = None,
    calls: Calls = None,
    residency: given.Residency = "auto",
    reference_device: given.ReferenceDevice = "auto",
    official: Official = False,
    official_repo: OfficialRepo = None,
    overwrite: given.Overwrite = False,
    **shared: Any,
) -> int:
    """Prove that the engines compute the same as PyTorch.

    The exit code is 1 if a check fails or a gate is missed.
    """
    if list_gates:
        return _list_gates()
    if precision_study or model is not None:
        remedy = "run it in a checkout of the source"
        raise UserError("validate --precision-study has moved", "python -m studies.precision -o DIR", remedy)
    blocks = memory_options.blocks_options(shared)
    parallel = blocks.gpus is not None or blocks.parallel is not None
    if engines is None or (checkpoint is None and not parallel):
        raise UserError("no ENGINES and CHECKPOINT", "both", "see wan-trt validate --help")
    request, several = given.request_from(locals() | shared), given.seeds_of(seeds)
    from validate import ValidateOptions, official_wheel
    from validate.options import check_no_report
    from wan_trt.recipes.lora_slots import SET, filled_slots

    reports = [output / f"report.{ending}" for ending in ("json", "xml", "md", "html")] if checkpoint else []
    reports += [output / "parallel.json"] if parallel else []
    for path in (*reports, None if calls is None else calls / "calls"):
        check_no_source(path, engines, bench, gate, prompts, cache_options.skip_steps_file(shared.get("skip_steps")))
    check_no_report(*reports, overwrite=overwrite)
    if official and official_repo is not None:
        raise UserError("both --official and --official-repo", "one of them", "leave one out")
    if official:
        official_repo = official_wheel()
    options = ValidateOptions(
        request, prompts, several, residency, reference_device, official_repo, calls, gate, bench, command_line(),
        blocks, overwrite=overwrite,
    )  # fmt: skip
    same = _compare_devices(engines, output, options) if parallel else 0
    if checkpoint is None:
        return same
    with filled_slots(engines, shared.get("loras") or (), checkpoint) as filled:
        if filled is not None:
            options = replace(options, request=replace(request, lora=SET), lora=(SET, filled))
        return max(same, _compare(engines, checkpoint, output, options))


def _compare_devices(engines: Path, output: Path, options: "ValidateOptions") -> int:
    from validate.parallel import validate_parallel, write_parallel
    from wan22.files import whole_file

    with whole_file(output / "parallel.json", "the report") as path, bars() as progress:
        report = validate_parallel(engines, options, progress)
        write_parallel(report, path)
    console.print(report.table())
    console.print(f"{report.summary()}: {output / 'parallel.json'}")
    return 0 if report else 1


def _compare(engines: Path, checkpoint: str, output: Path, options: "ValidateOptions") -> int:
    from validate import validate
    from validate.gate import check_mark

    with bars() as progress:
        report = validate(engines, checkpoint, output, options, progress)
    console.print(report.table())
    for verdict in report.verdicts:
        console.print(check_mark(verdict, f"gate {verdict}"))
    for case in report.cases:
        if case.cache is not None:
            name = f"case {case.number}: " if len(report.cases) > 1 else ""
            console.print(f"{name}{case.cache.summary()}")
    if not_judged := report.attached.not_judged:
        console.print(f"gates: {not_judged}")
    if len(report.cases) > 1:
        worst = report.worst_case
        console.print(f"{len(report.cases)} cases; the worst is {worst.number}: ", end="")
        console.print(worst.command)
    console.print(f"{report.summary()}: {output / 'report.html'}")
    return 0 if report else 1


def _list_gates() -> int:
    from validate.report.worst import known

    for name in known():
        print(name)
    return 0
