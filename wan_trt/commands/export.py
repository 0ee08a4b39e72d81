"""``wan-trt export``: checkpoint → ONNX bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wan22.quantities import human_bytes
from wan22.specs import Precision
from wan_trt.arguments import Frames, Overwrite, Size, blocks_of, size_of
from wan_trt.console import bars, command_line, console

if TYPE_CHECKING:
    from wan22.bundle import Bundle

Checkpoint = Annotated[
    str, typer.Argument(help="Folder in the official or -Diffusers layout, or a hub name.", show_default=False)
]
Folder = Annotated[Path, typer.Argument(help="Folder to write the ONNX bundle to.", show_default=False)]
PartPrecision = Annotated[Precision | None, typer.Option(help="Precision of this part alone.")]
Fp8Attention = Annotated[
    Literal["both", "self", "cross"], typer.Option(help="Which attention fp8-attn computes in FP8.")
]
Blocks = Annotated[str, typer.Option(metavar="BLOCKS", help="Transformer blocks without FP8, such as 0-2,37-39.")]
InputScales = Annotated[Path | None, typer.Option(help="JSON of static FP8 scales; per token and dynamic without one.")]
InputMeans = Annotated[
    Path | None, typer.Option(help="Means from wan-trt calibrate --means: FP8 linears err less, and run as fast.")
]
Loras = Annotated[
    list[str] | None,
    typer.Option(help="FILE.safetensors[@strength][:high|:low], merged into the experts; repeatable."),
]
IgnoreUnmatched = Annotated[
    bool, typer.Option("--lora-ignore-unmatched", help="Drop LoRA keys that the model has no weight for.")
]
SamplingPreset = Annotated[
    str | None, typer.Option("--preset", help="What the bundle samples with by default; wan-trt presets lists them.")
]
Link = Annotated[
    bool, typer.Option("--link", help="Share unconverted files with the checkpoint (clones or hard links).")
]


def run(
    checkpoint: Checkpoint,
    bundle: Folder,
    precision: Annotated[Precision, typer.Option(help="Of the matrix multiplications.")] = Precision.BF16,
    text_encoder: PartPrecision = None,
    high_noise: PartPrecision = None,
    low_noise: PartPrecision = None,
    dit: PartPrecision = None,
    vae_decoder: PartPrecision = None,
    fp8_attention: Fp8Attention = "both",
    keep_high_precision: Blocks = "",
    input_scales: InputScales = None,
    input_means: InputMeans = None,
    preset: SamplingPreset = None,
    size: Size = None,
    frames: Frames = None,
    lora: Loras = None,
    lora_ignore_unmatched: IgnoreUnmatched = False,
    link: Link = False,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint to ONNX, with dynamic shapes unless --size and --frames fix them."""
    fixed = size_of(size)
    from export.exporter import export_checkpoint
    from export.lora.merge import parse_lora
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
        blocks_of(keep_high_precision),
        input_scales,
        input_means,
        preset=preset,
        size=fixed,
        frames=frames,
        loras=tuple(map(parse_lora, lora or ())),
        lora_ignore_unmatched=lora_ignore_unmatched,
        link=link,
        overwrite=overwrite,
        command=command_line(),
    )
    with bars() as progress:
        made = export_checkpoint(checkpoint, bundle, options, progress)
    _tell(made)


def _tell(made: "Bundle") -> None:
    manifest = made.manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    names = ", ".join(component.name for component in manifest.components)
    console.print(f"{manifest.spec.name} {manifest.precision}, {human_bytes(size_bytes)}: {made.folder} ({names})")
