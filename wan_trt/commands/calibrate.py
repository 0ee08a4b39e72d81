"""``wan-trt calibrate``: prompts → static FP8 scales."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Frames, NegativePrompt, Overwrite, Residency, Seed, Size, size_of
from wan_trt.console import bars, console


def run(
    bundle: Annotated[Path, typer.Argument(help="ONNX bundle in 16 or 32 bits.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="JSON for wan-trt export --input-scales.", show_default=False)],
    prompts: Annotated[Path, typer.Option(help='One prompt a line; with images {"prompt": ..., "image": ...} a line.')],
    negative_prompt: NegativePrompt = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's default unless given.")] = None,
    size: Size = None,
    frames: Frames = None,
    seed: Seed = 0,
    margin: Annotated[float, typer.Option(help="Factor over the largest input seen.", min=1, max=4)] = 1.1,
    target: Annotated[str, typer.Option(help="What runs it, as in wan-trt build.")] = "cpu",
    means: Annotated[
        Path | None, typer.Option(help="Also write .safetensors for wan-trt export --input-means.")
    ] = None,
    residency: Residency = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure the largest inputs of all linears over prompts; FP8 without static scales scales each token by itself."""
    pixels = size_of(size)
    from validate.calibrate import CalibrateOptions, calibrate

    options = CalibrateOptions(
        prompts, steps, pixels, frames, seed, margin, target, means, overwrite, residency, negative_prompt
    )
    with bars() as progress:
        calibration = calibrate(bundle, out, options, progress)
    console.print(calibration.table())
    console.print(f"{calibration.coverage}: {out}")
