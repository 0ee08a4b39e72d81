"""``python -m studies.precision``: compares precisions with float32 on a small model with real magnitudes."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Seed, seed_of
from wan_trt.console import bars, command_line, console
from wan_trt.guard import command_of

PROGRAM = "python -m studies.precision"

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the reports, by model.")]
MODELS = ("ti2v-5b", "t2v-a14b")


def run(
    output: Output = Path("study"),
    model: Annotated[
        list[str] | None, typer.Option(help=f"A model to make a small twin of; by default {' and '.join(MODELS)}.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    seed: Seed = 0,
    write: Annotated[
        Path | None, typer.Option(help="Also write the figures that wan-trt plan --compare-precisions shows.")
    ] = None,
) -> int:
    """Compare precisions with float32. The exit code is 1 if a precision that can be exported collapses."""
    from engines.precision_figures import write_figures
    from studies.precision.run import StudyOptions, precision_study
    from studies.precision.table import figures_of, kernels_of, tables_of

    studies, drawn = {}, seed_of(seed)
    for name in model or MODELS:
        options = StudyOptions(name, steps=steps, seed=drawn, command=command_line(PROGRAM))
        with bars() as progress:
            studies[name] = study = precision_study(options, output / name, progress)
        console.print(study.table())
        for sentence in study.sentences:
            console.print(f"- {name}: {sentence}")
        console.print(str(output / name / "study.html"), style="dim")
    with bars() as progress:
        precisions = [r.variant.precision for r in study.results if r.variant.precision is not None]
        figures = figures_of(studies, kernels_of(precisions, progress))
    for table in tables_of(figures):
        console.print(table)
    if write is not None:
        write_figures(write, figures)
    return 0 if all(studies.values()) else 1


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
