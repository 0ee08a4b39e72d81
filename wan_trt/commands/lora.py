"""``wan-trt lora``: change the LoRAs of engines with external weights (``--weights external``)."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Overwrite
from wan_trt.console import bars, command_line, console


def apply(
    engines: Annotated[Path, typer.Argument(help="Engines built with --weights external.", show_default=False)],
    lora: Annotated[list[str], typer.Argument(metavar="FILE...", help="FILE.safetensors[@strength][:high|:low]")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the engines with the LoRAs to.")],
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint, if it has moved since the export.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRAs into the weights of engines without compiling again."""
    from export.lora.merge import parse_lora
    from wan_trt.recipes.apply_lora import ApplyOptions, apply_lora

    options = ApplyOptions(checkpoint, overwrite, command_line())
    with bars() as progress:
        apply_lora(engines, output, tuple(map(parse_lora, lora)), options, progress)
    console.print(f"{len(lora)} LoRA(s) merged: {output}")
