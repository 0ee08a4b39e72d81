"""The options of memory and devices, shared by several subcommands that run engines."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.quantities import parse_bytes

if TYPE_CHECKING:
    from runtime.block_backend import BlockOptions

WeightsIn = Annotated[
    Literal["auto", "vram", "host", "disk"] | None,
    typer.Option(
        metavar="PLACE", help="Blocks at rest: vram, host, disk, or by default auto (as many in VRAM as fit)."
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for what streams and for the VAE, as 8GiB; by default what is free."),
]
VaeStrips = Annotated[
    str | None,
    typer.Option(metavar="N", help="Strips of the VAE's pictures, or by default auto: as many as memory needs."),
]
Gpus = Annotated[str | None, typer.Option(metavar="0,1", help="GPUs to use; for target cpu, as many threads.")]
Parallel = Annotated[
    str | None, typer.Option(metavar="HOW", help="Their split: cfg2, ulyssesN, experts, vaeN with commas, or auto.")
]

MEMORY = {"weights_in": WeightsIn, "vram": Vram, "vae_strips": VaeStrips}
OPTIONS = {**MEMORY, "gpus": Gpus, "parallel": Parallel}


def blocks_options(options: Mapping[str, Any]) -> "BlockOptions":
    """Where the weights of engines in blocks are, how the VAE takes pictures, and the devices: by :data:`OPTIONS`."""
    from runtime.block_backend import BlockOptions

    vram, strips = options.get("vram"), options.get("vae_strips") or "auto"
    if strips != "auto" and not re.fullmatch(r"[1-9]\d{0,3}", strips):
        raise UserError(f"--vae-strips {strips!r}", "a number from 1 on, or auto", "write it as 4")
    budget, count = None if vram is None else parse_bytes(vram, "--vram"), None if strips == "auto" else int(strips)
    gpus, parallel = options.get("gpus"), options.get("parallel")
    return BlockOptions(options.get("weights_in") or "auto", budget, count, gpus, parallel)
