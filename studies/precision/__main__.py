"""``python -m studies.precision``: compares precisions with float32 on a small model with real magnitudes."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Seed, seed_of
from wan_trt.console import bars, command_line, console
from wan_trt.guard import command_of

PROGRAM = "python -m studies.precision"

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the report, HTML and JSON.")]


def run(
    output: Output = Path("study"),
    model: Annotated[str, typer.Option(help="The model to make a small twin of.")] = "ti2v-5b",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    seed: Seed = 0,
) -> int:
    """Compare precisions with float32. The exit code is 1 if a precision that can be exported collapses."""
    from studies.precision.run import StudyOptions, precision_study

    options = StudyOptions(model, steps=steps, seed=seed_of(seed), command=command_line(PROGRAM))
    with bars() as progress:
        study = precision_study(options, output, progress)
    console.print(study.table())
    for sentence in study.sentences:
        console.print(f"- {sentence}")
    console.print(str(output / "study.html"), style="dim")
    return 0 if study else 1


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
