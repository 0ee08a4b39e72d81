"""``wan-trt calibrate``: prompts → static FP8 scales."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt import arguments as given
from wan_trt.console import bars, console


def run(
    bundle: Annotated[Path, typer.Argument(help="ONNX bundle in 16 or 32 bits.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="JSON for wan-trt export --input-scales.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option(help='Prompts: one a line, or {"prompt": ..., "image": ...}; "# " begins a comment.')
    ],
    negative_prompt: given.NegativePrompt = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's.")] = None,
    size: given.Size = None,
    frames: given.Frames = None,
    seed: given.Seed = 0,
    margin: Annotated[float, typer.Option(help="Factor applied to the largest measured input.", min=1, max=4)] = 1.1,
    target: Annotated[str, typer.Option(help="Target to run it on, as in wan-trt build.")] = "cpu",
    means: Annotated[
        Path | None,
        typer.Option(help="Also write .safetensors for wan-trt export --input-means, for 8 and 4 bits."),
    ] = None,
    residency: given.Residency = "auto",
    overwrite: given.Overwrite = False,
) -> None:
    """Run prompts and measure the inputs of all linear layers: static FP8 scales, what INT8 costs, means."""
    request = given.request_from(locals())
    from wan_trt.recipes.calibrate import CalibrateOptions, calibrate

    options = CalibrateOptions(prompts, request, margin, target, means, overwrite, residency)
    with bars() as progress:
        calibration = calibrate(bundle, out, options, progress)
    console.print(calibration.table())
    console.print(calibration.advice)
    console.print(f"{calibration.coverage}: {out}")
