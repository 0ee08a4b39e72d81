"""``wan-trt lora``: change the LoRAs of engines in blocks."""

from pathlib import Path
from typing import Annotated

import typer

from wan22.bundle import open_bundle
from wan_trt.arguments import Overwrite
from wan_trt.console import bars, command_line, console

HELP = "FILE\\[@strength][:high|:low], as for wan-trt export --lora; the strength is 1 by default."


def apply(
    engines: Annotated[Path, typer.Argument(help="Engines built with --topology blocks.", show_default=False)],
    lora: Annotated[list[str], typer.Argument(metavar="FILE...", help=HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the engines with the LoRAs to.")],
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint, if it has moved since the export.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRAs into the weights of engines without compiling again; they replace LoRAs that the engines have."""
    from export.lora.merge import parse_lora
    from wan_trt.recipes.apply_lora import ApplyOptions, apply_lora

    manifest = open_bundle(engines, "engines").manifest
    options = ApplyOptions(checkpoint, overwrite, command_line())
    with bars() as progress:
        apply_lora(engines, output, tuple(map(parse_lora, lora)), options, progress)
    console.print(f"{len(lora)} {'LoRA' if len(lora) == 1 else 'LoRAs'} merged: {output}")
    if manifest.loras:
        replaced = ", ".join(each.shown(manifest.spec) for each in manifest.loras)
        console.print(f"replaces: {replaced}", highlight=False)
