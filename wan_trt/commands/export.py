"""``wan-trt export``: checkpoint → ONNX bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.quantities import human_bytes
from wan22.specs import Precision
from wan_trt.arguments import Frames, Overwrite, Size, blocks_of, size_of
from wan_trt.console import bars, command_line, console

if TYPE_CHECKING:
    from wan22.bundle import Bundle

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Folder of a checkpoint, or a hub name; leave it out where files are named for all parts.",
        show_default=False,
    ),
]
Folder = Annotated[Path | None, typer.Argument(help="Folder to write the ONNX bundle to.", show_default=False)]
Part = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|PRECISION", help="A file in place of the checkpoint's, a precision, or both (twice)."),
]
PartPrecision = Annotated[Precision | None, typer.Option(help="Precision of this part alone.")]
Vae = Annotated[Path | None, typer.Option(metavar="FILE", help="A file in place of the checkpoint's VAE.")]
Tokenizer = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with tokenizer.json, or a spiece.model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
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
    bundle: Folder = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the matrix multiplications; fp32 for cpu, bf16 for a GPU unless given.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What the engines will be built for, as in wan-trt build; cpu unless given.")
    ] = None,
    text_encoder: Part = None,
    high_noise: Part = None,
    low_noise: Part = None,
    dit: Part = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
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

    named = {"text_encoder": text_encoder, "high_noise": high_noise, "low_noise": low_noise, "dit": dit}
    files, precisions = _files_and_precisions(named)
    files |= {part: path for part, path in (("vae", vae), ("tokenizer", tokenizer)) if path is not None}
    precisions |= {"vae_decoder": vae_decoder} if vae_decoder is not None else {}
    precision = _for_target(target, precision, precisions)
    where, bundle = _place(checkpoint, bundle, files, revision)
    options = ExportOptions(
        precision,
        precisions,
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
        made = export_checkpoint(where, bundle, options, progress)
    _tell(made)


def _for_target(target: str | None, precision: Precision | None, parts: dict[str, Precision]) -> Precision:
    """The precision of the model for ``target``; adds that of its text encoder to ``parts`` where it differs.

    Raises:
        UserError: a precision that ``target`` does not compute.
    """
    from engines.targets import check_precision, target_named

    aim = target_named(target or "cpu")
    if precision is None and target is None:
        console.print("fp32, for target cpu; for a GPU add --target or --precision")
    elif target is not None and precision is not None:
        check_precision(aim, precision)
    chosen = precision or aim.default_precision
    if target is not None and aim.text_encoder_precision(chosen) != chosen.wide:
        parts.setdefault("text_encoder", aim.text_encoder_precision(chosen))
    return chosen


def _files_and_precisions(named: Mapping[str, list[str] | None]) -> tuple[dict[str, Path], dict[str, Precision]]:
    """What stands in the options of the parts: a file, a precision, or one of each."""
    files: dict[str, Path] = {}
    precisions: dict[str, Precision] = {}
    for part, values in named.items():
        option = f"--{part.replace('_', '-')}"
        for value in values or ():
            target: dict[str, Any] = precisions if value in list(Precision) else files
            if part in target:
                raise UserError(f"{option} {value} beside {target[part]}", "a file and a precision", "name one of each")
            target[part] = Precision(value) if target is precisions else Path(value)
            if target is files and not Path(value).exists() and "." not in value and "/" not in value:
                raise UserError(f"{option} {value}", f"a file, or one of {', '.join(Precision)}", "check the name")
    return files, precisions


def _place(checkpoint: str, bundle: Path | None, files: Mapping[str, Path], revision: str | None) -> tuple[str, Path]:
    """The checkpoint, as one string, and the folder to write to; with one argument alone it is the latter."""
    from export.checkpoint.hub import is_hub_name
    from export.checkpoint.place import Place

    if bundle is None and not files:
        raise UserError("one argument", "a checkpoint and a folder to write", "name both, or files for all parts")
    whole = checkpoint if bundle is not None else ""
    if revision is not None:
        if not is_hub_name(whole):
            raise UserError(f"--revision {revision}", "a hub name such as owner/name", "leave it off")
        whole = f"{whole}@{revision}"
    return str(Place(whole, files)), bundle if bundle is not None else Path(checkpoint)


def _tell(made: "Bundle") -> None:
    manifest = made.manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    names = ", ".join(component.name for component in manifest.components)
    console.print(f"{manifest.spec.name} {manifest.precision}, {human_bytes(size_bytes)}: {made.folder} ({names})")
