"""``wan-trt mlperf``: engines under MLPerf's load generator."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.outputs import check_no_source
from wan_trt import arguments as given
from wan_trt import memory_options
from wan_trt.console import bars, command_line, console

PROMPTS = (
    "a red ball rolls slowly across a wooden table",
    "waves break on a rocky shore at sunset, wide shot",
    "a woman in a yellow coat walks through falling snow",
    "steam rises from a cup of coffee by a rainy window",
)


@given.with_options(memory_options.OPTIONS)
def run(
    engines: given.Engines,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for LoadGen's logs and the videos.")],
    scenario: Annotated[
        Literal["SingleStream", "Offline"], typer.Option(help="One sample after the other, or all at once.")
    ] = "SingleStream",
    samples: Annotated[int | None, typer.Option(help="Samples to measure at least; by default 1.", min=1)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; by default four built-in ones.")] = None,
    accuracy: Annotated[bool, typer.Option("--accuracy", help="Make every prompt once; measure nothing.")] = False,
    min_duration_s: Annotated[
        float | None, typer.Option(help="Seconds that a run lasts at least; by default 0.", min=0)
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="The audit.config of a compliance test.")] = None,
    size: given.Size = None,
    frames: given.Frames = None,
    preset: given.Preset = "mlperf",
    steps: given.Steps = None,
    seed: given.Seed = 42,
    noise: given.Noise = None,
    negative_prompt: given.NegativePrompt = None,
    overwrite: given.Overwrite = False,
    **shared: Any,
) -> int:
    """Measure engines with MLPerf's LoadGen, in the setting of its text-to-video benchmark; no submission by itself."""
    check_no_source(output, engines, prompts, noise, audit)
    request = given.request_from(locals())
    from runtime.prompts import read_prompts
    from wan_trt.recipes.mlperf import MlperfOptions, check_options, run_mlperf

    if accuracy and (samples is not None or min_duration_s is not None):
        found = "--accuracy with --samples or --min-duration-s"
        raise UserError(found, "an accuracy run, which makes every prompt once", "leave them out")
    blocks, least = memory_options.blocks_options(shared), min_duration_s or 0.0
    options = MlperfOptions(scenario, samples or 1, accuracy, least, audit, overwrite, command_line(), blocks)
    check_options(options)
    texts = [prompt.text for prompt in read_prompts(prompts, "no")] if prompts else list(PROMPTS)
    with bars() as progress:
        result = run_mlperf(engines, output, texts, request, options, progress)
    figure = result.figure or "an accuracy run has no figure"
    console.print(f"{scenario}, {result.videos} videos: {figure}: {output}")
    console.print(f"no submission; it lacks {'; '.join(result.lacks)}", highlight=False)
    if not accuracy and not result.valid:
        console.print("LoadGen calls the run INVALID; its summary says why")
    return 0
