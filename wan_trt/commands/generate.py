"""``wan-trt generate``: engines and a prompt → video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from wan_trt.arguments import (
    ExactOfficial,
    ExpertGuidance,
    Fit,
    Frames,
    Guidance,
    Image,
    LastImage,
    NegativePrompt,
    Preset,
    Residency,
    Schedule,
    Seed,
    Shift,
    Size,
    Solver,
    Steps,
    by_expert,
    size_of,
)
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from runtime.generate import Timings


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What the video shows, in any language.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".mp4, .webm, .npz, .png, .jpg, or a folder for PNG frames.")
    ],
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
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.", min=1, max=240)] = None,
    shift: Shift = None,
    guidance_high_noise: ExpertGuidance = None,
    guidance_low_noise: ExpertGuidance = None,
    guidance: Guidance = None,
    solver: Solver = None,
    schedule: Schedule = "official",
    residency: Residency = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print where the time went.")] = False,
) -> None:
    """Generate a video. What is not given is the model's default."""
    from runtime.generate import generate
    from runtime.pipeline import Pipeline
    from runtime.request import Request

    with Pipeline.open(engines, residency=residency, once=True, tell=console.print) as pipeline, bars() as progress:
        chosen = {} if guidance is None else dict.fromkeys(pipeline.spec.experts, guidance)
        request = Request(
            prompt,
            negative_prompt,
            size_of(size),
            frames,
            image=image,
            last_image=last_image,
            fit=fit,
            exact_official=exact_official,
            seed=seed,
            preset=preset,
            steps=steps,
            shift=shift,
            guidance=chosen | by_expert(guidance_high_noise, guidance_low_noise),
            solver=solver,
            schedule=schedule,
        )
        result = generate(pipeline, request, output, fps=fps, progress=progress)
    if verbose:
        _print_timings(result.timings)
    console.print(f"{output}: {result.width}x{result.height}, {result.frames} frames at {result.fps} fps, seed {seed}")


def _print_timings(timings: "Timings") -> None:
    table = Table("step", "timestep", "expert", "engine ms", "total ms", title="Denoising")
    for step in timings.steps:
        times = (f"{1000 * s:.1f}" for s in (step.engine_seconds, step.total_seconds))
        table.add_row(str(step.index + 1), f"{step.timestep:g}", step.expert, *times)
    console.print(table)
    for stage, seconds in timings.stages.items():
        console.print(f"{stage}: {seconds:.2f} s")
    console.print(f"sampler overhead outside engines: {100 * timings.sampler_overhead:.1f} % of a step (median)")
