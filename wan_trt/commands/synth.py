"""``wan-trt synth``: a checkpoint with random weights in the layout of a real one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wan22.specs import spec_named
from wan_trt.arguments import Seed, seed_of
from wan_trt.console import bars, console


def run(
    model: Annotated[str, typer.Argument(help="A model, such as t2v-a14b-tiny.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder to write it to; must not exist.", show_default=False)],
    layout: Annotated[Literal["official", "diffusers"], typer.Option(help="The release to imitate.")] = "official",
    seed: Seed = 0,
    half: Annotated[bool, typer.Option("--half", help="Transformers in bfloat16, like converted releases.")] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="Files of the real size that take no disk space.")] = False,
) -> None:
    """Make a checkpoint with random weights and the file names, keys and types of a real one."""
    spec = spec_named(model)
    from export.synth.checkpoint import synthesise

    with bars() as progress:
        synthesise(spec, folder, layout, seed_of(seed), sparse=sparse, half=half, progress=progress)
    console.print(f"{spec.name} in the {layout} layout: {folder}")
