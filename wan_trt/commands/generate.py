"""``wan-trt generate``: engines and a prompt → video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from wan_trt.arguments import Frames, Seed, Size, size_of
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from runtime.generate import Timings

Guidance = Annotated[float | None, typer.Option(help="Guidance scale of this expert; 1 skips the unconditional pass.")]


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What the video shows, in any language.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4, .png, .jpg, or a folder for PNG frames.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid; the official one unless given.")] = None,
    size: Size = None,
    frames: Frames = None,
    image: Annotated[Path | None, typer.Option(help="Image to start from (I2V, TI2V): JPEG, PNG or WebP.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="Image to end with (I2V).")] = None,
    fit: Annotated[
        Literal["official", "crop"], typer.Option(help="Keep the image's shape, or crop it to exactly --size.")
    ] = "official",
    exact_official: Annotated[
        bool, typer.Option("--exact-official", help="Round sizes as the official code does, float errors included.")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="lightning: 4 Euler steps without guidance.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Seed = 0,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.", min=1, max=240)] = None,
    shift: Annotated[float | None, typer.Option(help="Bend of the noise schedule.")] = None,
    guidance_high_noise: Guidance = None,
    guidance_low_noise: Guidance = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of all experts.")] = None,
    solver: Annotated[Literal["unipc", "dpm++", "euler"] | None, typer.Option(help="unipc unless given.")] = None,
    schedule: Annotated[Literal["official", "diffusers"], typer.Option(help="Whose list of timesteps.")] = "official",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print where the time went.")] = False,
) -> None:
    """Generate a video. What is not given is the model's default."""
    from runtime.generate import generate
    from runtime.pipeline import Pipeline
    from runtime.request import Request

    with Pipeline.open(engines) as pipeline, bars() as progress:
        by_expert = {"high_noise": guidance_high_noise, "low_noise": guidance_low_noise}
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
            guidance=chosen | {name: value for name, value in by_expert.items() if value is not None},
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
