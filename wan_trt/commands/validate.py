"""``wan-trt validate``: engines beside the PyTorch reference."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import (
    ExactOfficial,
    ExpertGuidance,
    Fit,
    Frames,
    Guidance,
    LastImage,
    NegativePrompt,
    Preset,
    Schedule,
    Seed,
    Shift,
    Size,
    Solver,
    Steps,
    by_expert,
    size_of,
)
from wan_trt.console import bars, command_line, console


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle, or the ONNX bundle.", show_default=False)],
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint it was exported from.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for report.html and report.json.")],
    prompt: Annotated[str | None, typer.Option(help="Prompt of the compared run.")] = None,
    negative_prompt: NegativePrompt = None,
    size: Size = None,
    frames: Frames = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to start from (I2V, TI2V); a built-in picture unless given.")
    ] = None,
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
    official_repo: Annotated[
        Path | None, typer.Option(help="A clone of Wan-Video/Wan2.2, to compare with its code as well.")
    ] = None,
) -> int:
    """Prove that the engines compute what PyTorch computes. Exit code 1 when a row fails."""
    fixed = size_of(size)
    from validate import ValidateOptions, validate

    options = ValidateOptions(
        prompt,
        negative_prompt,
        fixed,
        frames,
        image=image,
        last_image=last_image,
        fit=fit,
        exact_official=exact_official,
        seed=seed,
        preset=preset,
        steps=steps,
        shift=shift,
        guidance=guidance,
        guidance_of=by_expert(guidance_high_noise, guidance_low_noise),
        solver=solver,
        schedule=schedule,
        official_repo=official_repo,
        command=command_line(),
    )
    with bars() as progress:
        report = validate(engines, checkpoint, output, options, progress)
    console.print(report.table())
    console.print(f"{report.summary()}: {output / 'report.html'}")
    return 0 if report else 1
