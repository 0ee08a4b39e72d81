"""``wan-trt build``: ONNX bundle → engines for one target."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Overwrite
from wan_trt.console import bars, command_line, console


def run(
    bundle: Annotated[Path, typer.Argument(help="ONNX bundle made by wan-trt export.", show_default=False)],
    engines: Annotated[Path, typer.Argument(help="Folder to write the engines to.", show_default=False)],
    target: Annotated[str, typer.Option(help="GPU to build for, or cpu.")] = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Build the engines of an ONNX bundle for a target."""
    from engines.build import BuildOptions, build_engines

    with bars() as progress:
        result = build_engines(bundle, engines, BuildOptions(target, overwrite, command_line()), progress)
    build = result.manifest.build
    assert build is not None
    told = f"{build.backend} {build.backend_version}, {build.seconds:.1f} s"
    console.print(f"{result.manifest.spec.name} {result.manifest.precision} for {target} ({told}): {engines}")
