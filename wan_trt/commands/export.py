"""``wan-trt export``: checkpoint → ONNX bundle."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wan22.specs import Precision
from wan_trt.arguments import Frames, Overwrite, Size, numbers_of, size_of
from wan_trt.console import bars, command_line, console

PartPrecision = Annotated[Precision | None, typer.Option(help="Precision of this part alone.")]


def run(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder in the official or -Diffusers layout, or a hub name.", show_default=False)
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder to write the ONNX bundle to.", show_default=False)],
    precision: Annotated[Precision, typer.Option(help="Of the matrix multiplications.")] = Precision.BF16,
    text_encoder: PartPrecision = None,
    high_noise: PartPrecision = None,
    low_noise: PartPrecision = None,
    dit: PartPrecision = None,
    vae_decoder: PartPrecision = None,
    fp8_attention: Annotated[
        Literal["both", "self", "cross"], typer.Option(help="Which attention fp8-attn computes in FP8.")
    ] = "both",
    keep_high_precision: Annotated[
        str, typer.Option(metavar="BLOCKS", help="Transformer blocks without FP8, such as 0-2,37-39.")
    ] = "",
    input_scales: Annotated[
        Path | None, typer.Option(help="JSON of static FP8 scales; per token and dynamic without one.")
    ] = None,
    input_means: Annotated[
        Path | None, typer.Option(help="Means from wan-trt calibrate --means: FP8 linears err less, and run as fast.")
    ] = None,
    size: Size = None,
    frames: Frames = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE.safetensors[@strength][:high|:low], merged into the experts; repeatable."),
    ] = None,
    lora_ignore_unmatched: Annotated[
        bool, typer.Option("--lora-ignore-unmatched", help="Drop LoRA keys that the model has no weight for.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Share unconverted files with the checkpoint (clones or hard links).")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint to ONNX. Shapes are dynamic unless --size and --frames fix them."""
    fixed = size_of(size)
    from export.exporter import export_checkpoint
    from export.lora import parse_lora
    from export.options import ExportOptions

    parts = {
        "text_encoder": text_encoder,
        "high_noise": high_noise,
        "low_noise": low_noise,
        "dit": dit,
        "vae_decoder": vae_decoder,
    }
    options = ExportOptions(
        precision,
        {part: chosen for part, chosen in parts.items() if chosen is not None},
        fp8_attention,
        numbers_of(keep_high_precision),
        input_scales,
        input_means,
        size=fixed,
        frames=frames,
        loras=tuple(map(parse_lora, lora or ())),
        lora_ignore_unmatched=lora_ignore_unmatched,
        link=link,
        overwrite=overwrite,
        command=command_line(),
    )
    with bars() as progress:
        result = export_checkpoint(checkpoint, bundle, options, progress)
    size_bytes = sum(file.size_bytes for file in result.manifest.files().values())
    names = ", ".join(component.name for component in result.manifest.components)
    console.print(f"{result.manifest.spec.name} {precision}, {size_bytes / 2**30:.2f} GiB: {bundle} ({names})")
