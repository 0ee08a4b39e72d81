"""``wan-trt generate``: engines and a prompt → video."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.outputs import check_no_source
from wan22.quantities import human_bytes, video_text
from wan_trt import arguments as given
from wan_trt import cache_options, memory_options, prompt_options
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from runtime.generate import Timings
    from runtime.pipeline import Pipeline
    from runtime.request import Request
    from wan22.bundle import Manifest
    from wan22.progress import Progress


@given.with_options(
    given.SAMPLING,
    cache_options.OPTIONS,
    prompt_options.OPTIONS,
    prompt_options.EXTENSION,
    memory_options.OPTIONS,
    given.SLOTS,
)
def run(
    engines: given.Engines,
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".mp4, .webm, .npz, .png, .jpg, or a folder for PNG frames.")
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="Description of the video, in any language.", show_default=False)
    ] = None,
    again: Annotated[
        Path | None, typer.Option(help="Make this .mp4, .webm or .png again, with the settings in its metadata.")
    ] = None,
    size: given.Size = None,
    frames: given.Frames = None,
    image: given.Image = None,
    last_image: given.LastImage = None,
    fit: given.Fit = "official",
    exact_official: given.ExactOfficial = False,
    seed: Annotated[int | None, given.SEED] = None,
    noise: given.Noise = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.", min=1, max=240)] = None,
    quality: given.Quality = None,
    schedule: given.Schedule = None,
    overwrite: given.Overwrite = False,
    residency: given.Residency = "auto",
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint for --lora, if it has moved.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the time of every stage and step.")] = False,
    **shared: Any,
) -> None:
    """Generate a video; settings not given are the bundle's defaults."""
    request = given.request_from(locals() | shared)
    from runtime.generate import Encoding, generate
    from runtime.pipeline import Pipeline
    from runtime.video import QUALITY
    from runtime.weight_sets import WeightSets

    listed = cache_options.skip_steps_file(shared.get("skip_steps"))
    check_no_source(output, noise, again, image, last_image, listed)
    given.check_used(output, quality, image, fit, exact_official=exact_official)
    if again is not None:
        request, fps, quality = _again(again, request, engines, fps, quality, with_loras=bool(shared.get("loras")))
    blocks = memory_options.blocks_options(shared)
    opened = Pipeline.open(engines, residency=residency, once=True, tell=console.print, blocks=blocks)
    with (
        bars() as progress,
        _filled_slots(engines, shared.get("loras"), checkpoint, progress) as filled,
        opened as pipeline,
    ):
        if filled is not None:
            own = open_bundle(filled, "engines")
            name = ", ".join(lora.shown(own.manifest.spec) for lora in own.manifest.loras)
            pipeline.weight_sets = WeightSets(pipeline.bundle, {name: own})
            request = replace(request, lora=name)
        if again is not None:
            _print_differences(again, pipeline.weight_sets.manifest(request.lora))
        request = prompt_options.extended_request(shared, request, pipeline)
        encoding = Encoding(fps, QUALITY if quality is None else quality, overwrite)
        result = generate(pipeline, request, output, encoding, progress=progress)
    if verbose:
        _print_timings(result.timings, pipeline)
    shown = video_text(result.width, result.height, result.frames)
    console.print(f"{output}: {shown} at {result.fps} fps, seed {result.seed}")
    if result.cache is not None:
        cache_options.print_decisions(result.timings.skipped, result.timings.late, len(result.timings.steps))


def _filled_slots(
    engines: Path, loras: Sequence[str] | None, checkpoint: str | None, progress: "Progress"
) -> AbstractContextManager[Path | None]:
    """The weight set for ``loras``. Without any, nothing of the export is imported."""
    if not loras:
        if checkpoint is not None:
            raise UserError("--checkpoint without --lora", "a LoRA beside it", "leave it out")
        return nullcontext()
    from wan_trt.recipes.lora_slots import filled_slots

    return filled_slots(engines, loras, checkpoint, progress)


def _again(
    video: Path, given_files: "Request", engines: Path, fps: int | None, quality: int | None, *, with_loras: bool
) -> "tuple[Request, int, int]":
    """The request, frame rate and quality of ``video``, whose LoRAs have to be given again for engines with slots."""
    from runtime.recipe import read_recipe
    from runtime.weight_sets import lora_slots
    from wan22.bundle import read_manifest

    recipe = read_recipe(video)
    manifest = read_manifest(engines, "engines")
    if manifest.spec.name != recipe.model:
        raise UserError(
            f"{video} was made by {recipe.model}", f"engines of {recipe.model}", "name others, or its prompt"
        )
    if recipe.lora and lora_slots(manifest) and not with_loras:
        found = f"no --lora, which {video} was made with: {recipe.lora}"
        raise UserError(found, "the same LoRAs, which engines with slots do not hold", "give its --lora again")
    if with_loras and not recipe.lora:
        raise UserError(f"--lora for {video}", "none, as in the first run", "leave it out")
    return recipe.request(given_files), fps or recipe.fps, recipe.quality if quality is None else quality


def _print_differences(video: Path, weights: "Manifest") -> None:
    """A line if other engines, or other LoRAs, made ``video`` than those of ``weights``."""
    from runtime.recipe import read_recipe

    recipe = read_recipe(video)
    if weights.own_sha256 == recipe.bundle:
        return
    if recipe.lora:
        console.print(f"{video} was made with the LoRAs {recipe.lora}, by other engines or files: frames may differ")
    else:
        console.print(f"{video} was made by other engines ({recipe.model}): frames will differ")


def _print_timings(timings: "Timings", pipeline: "Pipeline") -> None:
    table = Table("step", "timestep", "expert", "engine ms", "total ms", title="Denoising")
    for step in timings.steps:
        times = [f"{1000 * s:.1f}" for s in (step.engine_seconds, step.total_seconds)]
        times[0] = "skipped" if step.cached else times[0]
        table.add_row(str(step.index + 1), f"{step.timestep:g}", step.expert, *times)
    console.print(table)
    for stage, seconds in timings.stages.items():
        console.print(f"{stage}: {seconds:.2f} s")
    console.print(f"sampler overhead outside engines: {100 * timings.sampler_overhead:.1f} % of a step (median)")
    if (streamed := pipeline.streamed) is not None:
        size, took = human_bytes(streamed.size_bytes), f"took {streamed.seconds_copied:.2f} s"
        waited = f"{streamed.seconds_waited:.2f} s of it not hidden"
        at_switch = f"{streamed.seconds_waited_at_switches:.2f} s at the change of expert"
        console.print(f"weights of blocks: {size} in {streamed.blocks:,} copies {took}, {waited}, {at_switch}")
    if links := pipeline.backend.links:
        most = max(links, key=lambda link: link.sent_bytes)
        console.print(f"a device sent {human_bytes(most.sent_bytes)} to others, in {most.seconds:.2f} s of exchanges")
