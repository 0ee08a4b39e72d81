"""``wan-trt validate``: engines beside the PyTorch reference."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Frames, Seed, Size, size_of
from wan_trt.console import bars, command_line, console


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint it was exported from.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for report.html and report.json.")],
    prompt: Annotated[str | None, typer.Option(help="Prompt of the compared run.")] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the compared run.")] = None,
    seed: Seed = 0,
) -> int:
    """Prove that the engines compute what PyTorch computes. Exit code 1 when a row fails."""
    fixed = size_of(size)
    from validate import ValidateOptions, validate

    options = ValidateOptions(prompt=prompt, size=fixed, frames=frames, steps=steps, seed=seed, command=command_line())
    with bars() as progress:
        report = validate(engines, checkpoint, output, options, progress)
    console.print(report.table())
    console.print(f"{report.summary()}: {output / 'report.html'}")
    return 0 if report else 1
