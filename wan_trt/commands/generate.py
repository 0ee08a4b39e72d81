"""``wan-trt generate``: engines and a prompt → video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from wan22.quantities import video_text
from wan_trt import arguments as given
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from runtime.generate import Timings


def run(
    engines: given.Engines,
    prompt: given.Prompt,
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".mp4, .webm, .npz, .png, .jpg, or a folder for PNG frames.")
    ],
    negative_prompt: given.NegativePrompt = None,
    size: given.Size = None,
    frames: given.Frames = None,
    image: given.Image = None,
    last_image: given.LastImage = None,
    fit: given.Fit = "official",
    exact_official: given.ExactOfficial = False,
    preset: given.Preset = None,
    boundary: given.Boundary = None,
    steps: given.Steps = None,
    seed: given.Seed = 0,
    noise: given.Noise = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.", min=1, max=240)] = None,
    shift: given.Shift = None,
    guidance_high_noise: given.ExpertGuidance = None,
    guidance_low_noise: given.ExpertGuidance = None,
    guidance: given.Guidance = None,
    solver: given.Solver = None,
    schedule: given.Schedule = None,
    overwrite: given.Overwrite = False,
    residency: given.Residency = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print where the time went.")] = False,
) -> None:
    """Generate a video with the default settings of the bundle unless others are given."""
    request = given.request_from(locals())
    from runtime.generate import generate
    from runtime.pipeline import Pipeline

    with Pipeline.open(engines, residency=residency, once=True, tell=console.print) as pipeline, bars() as progress:
        result = generate(pipeline, request, output, fps=fps, overwrite=overwrite, progress=progress)
    if verbose:
        _print_timings(result.timings)
    shown = video_text(result.width, result.height, result.frames)
    console.print(f"{output}: {shown} at {result.fps} fps, seed {result.seed}")


def _print_timings(timings: "Timings") -> None:
    table = Table("step", "timestep", "expert", "engine ms", "total ms", title="Denoising")
    for step in timings.steps:
        times = (f"{1000 * s:.1f}" for s in (step.engine_seconds, step.total_seconds))
        table.add_row(str(step.index + 1), f"{step.timestep:g}", step.expert, *times)
    console.print(table)
    for stage, seconds in timings.stages.items():
        console.print(f"{stage}: {seconds:.2f} s")
    console.print(f"sampler overhead outside engines: {100 * timings.sampler_overhead:.1f} % of a step (median)")
