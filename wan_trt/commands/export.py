"""``wan-trt export``: checkpoint → ONNX bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.precision import Number, Precision, precision_named
from wan22.quantities import human_bytes
from wan_trt.arguments import PRECISIONS, Frames, LowRank, Overwrite, Size, kept_of, size_of
from wan_trt.console import bars, command_line, console

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder or hub name; not needed if options name files for all parts.", show_default=False
    ),
]
Folder = Annotated[Path | None, typer.Argument(help="Folder to write the ONNX bundle to.", show_default=False)]
Part = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|PRECISION", help="A file to replace the checkpoint's, a precision, or both (twice)."),
]
ModelPrecision = Annotated[
    str | None,
    typer.Option(metavar="PRECISION", help=f"{PRECISIONS}; by default fp32 for cpu, bf16 for a GPU."),
]
Target = Annotated[
    str | None, typer.Option(help="Target to build the engines for, as in wan-trt build; by default cpu.")
]
PartPrecision = Annotated[str | None, typer.Option(metavar="PRECISION", help="Precision of this part alone.")]
Vae = Annotated[Path | None, typer.Option(metavar="FILE", help="A file to use instead of the checkpoint's VAE.")]
Tokenizer = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with tokenizer.json, or a spiece.model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
Fp8Attention = Annotated[
    Literal["both", "self", "cross"] | None,
    typer.Option(help="Attention that fp8-attn computes in FP8; by default both."),
]
Kept = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        help="As 0-2,39: blocks in 16 bits; as ffn.2=fp8: linears in another type; auto: those INT8 does not suit.",
    ),
]
InputScales = Annotated[Path | None, typer.Option(help="JSON of static FP8 scales; the default is dynamic, per token.")]
InputMeans = Annotated[
    Path | None, typer.Option(help="Means and factors from wan-trt calibrate --means, instead of those without data.")
]
Loras = Annotated[list[str] | None, typer.Option(help="LoRA to merge, FILE\\[@strength][:high|:low]; repeatable.")]
IgnoreUnmatched = Annotated[
    bool, typer.Option("--lora-ignore-unmatched", help="Drop LoRA keys without a matching weight in the model.")
]
SamplingPreset = Annotated[
    str | None, typer.Option("--preset", help="Default sampling settings of the bundle; wan-trt presets lists them.")
]
Link = Annotated[
    bool, typer.Option("--link", help="Share unconverted files with the checkpoint (clones or hard links).")
]


def run(
    checkpoint: Checkpoint,
    bundle: Folder = None,
    precision: ModelPrecision = None,
    target: Target = None,
    text_encoder: Part = None,
    high_noise: Part = None,
    low_noise: Part = None,
    dit: Part = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    vae_decoder: PartPrecision = None,
    fp8_attention: Fp8Attention = None,
    keep_high_precision: Kept = None,
    input_scales: InputScales = None,
    input_means: InputMeans = None,
    low_rank: LowRank = 0,
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
    from engines.targets import number_of_peaked
    from export.exporter import export_checkpoint
    from export.lora.merge import parse_lora
    from export.options import ExportOptions

    named = {"text_encoder": text_encoder, "high_noise": high_noise, "low_noise": low_noise, "dit": dit}
    files, precisions = _files_and_precisions(named)
    files |= {part: path for part, path in (("vae", vae), ("tokenizer", tokenizer)) if path is not None}
    precisions |= {"vae_decoder": precision_named(vae_decoder)} if vae_decoder is not None else {}
    chosen = _for_target(target, None if precision is None else precision_named(precision), precisions)
    where, bundle = _place(checkpoint, bundle, files, revision)
    blocks, linears, by_crest, kept_in = kept_of(keep_high_precision)
    _check_kept(target, linears)
    options = ExportOptions(
        chosen,
        precisions,
        fp8_attention,
        blocks,
        linears,
        (kept_in or number_of_peaked(target)) if by_crest else None,
        input_scales,
        input_means,
        low_rank,
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
        manifest = export_checkpoint(where, bundle, options, progress).manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    names = ", ".join(component.name for component in manifest.components)
    console.print(f"{manifest.spec.name} {manifest.precision_text}, {human_bytes(size_bytes)}: {bundle} ({names})")


def _for_target(target: str | None, precision: Precision | None, parts: dict[str, Precision]) -> Precision:
    """The model's precision for ``target``; a different one of the text encoder is added to ``parts``.

    Raises:
        UserError: ``target`` does not support ``precision``, or the quantised one of a part.
    """
    from engines.targets import check_precision, target_named

    aim = target_named(target or "cpu")
    if precision is None and target is None:
        console.print("fp32, for target cpu; for a GPU add --target or --precision")
    elif target is not None and precision is not None:
        check_precision(aim, precision)
    for of_part in parts.values():
        if target is not None and of_part.quantised:
            check_precision(aim, of_part)
    chosen = precision or aim.default_precision
    if target is not None and aim.text_encoder_precision(chosen) != chosen.wide:
        parts.setdefault("text_encoder", aim.text_encoder_precision(chosen))
    return chosen


def _check_kept(target: str | None, linears: Mapping[str, Number]) -> None:
    """Refuse linears in a type that ``target`` does not multiply."""
    from engines.targets import target_named

    for linear, number in linears.items():
        if target is not None and number not in (numbers := target_named(target).numbers):
            found = f"--keep-high-precision {linear}={number} for {target}"
            raise UserError(found, ", ".join(numbers), "choose one of these")


def _files_and_precisions(named: Mapping[str, list[str] | None]) -> tuple[dict[str, Path], dict[str, Precision]]:
    """The files and precisions from the options of the parts, each a file, a precision or both."""
    files: dict[str, Path] = {}
    precisions: dict[str, Precision] = {}
    for part, values in named.items():
        option = f"--{part.replace('_', '-')}"
        for value in values or ():
            target: dict[str, Any] = precisions if value in list(Precision) else files
            if part in target:
                raise UserError(f"{option} {value} after {target[part]}", "a file and a precision", "name one of each")
            target[part] = Precision(value) if target is precisions else Path(value)
            if value.endswith("int8-attn"):
                precision_named(value)  # says why not
            if target is files and not Path(value).exists() and "." not in value and "/" not in value:
                raise UserError(f"{option} {value}", f"a file, or one of {', '.join(Precision)}", "check the name")
    return files, precisions


def _place(checkpoint: str, bundle: Path | None, files: Mapping[str, Path], revision: str | None) -> tuple[str, Path]:
    """The checkpoint as one string, and the output folder; a single argument is the output folder."""
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
