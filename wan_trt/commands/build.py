"""``wan-trt build``: ONNX bundle → engines for one target."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from wan22.errors import UserError
from wan22.quantities import human_bytes
from wan_trt.arguments import Overwrite
from wan_trt.console import bars, command_line, console


def run(
    bundle: Annotated[Path, typer.Argument(help="ONNX bundle made by wan-trt export.", show_default=False)],
    engines: Annotated[Path, typer.Argument(help="Folder to write the engines to.", show_default=False)],
    target: Annotated[
        str, typer.Option(help="GPU such as rtx4090 or h100, cuda (ONNX Runtime on any GPU), cpu, or auto.")
    ] = "cpu",
    size: Annotated[
        str | None, typer.Option(help="832x480, several with commas, a range 480x480..1280x720, 480p, 720p or 5b.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="81, or a range 5..81.")] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 parts run in TF32.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="Kernel timings to reuse and extend (TensorRT).")] = None,
    weights: Annotated[Literal["embedded", "external"] | None, typer.Option(hidden=True)] = None,  # has become topology
    topology: Annotated[
        Literal["whole", "blocks"] | None,
        typer.Option(
            help="blocks: small engines that every block of a transformer calls, their weights in files, the default "
            "for TensorRT; whole: one engine, weights inside."
        ),
    ] = None,
    vae_strips: Annotated[
        int | None,
        typer.Option(metavar="N", help="VAE for pictures in 1 to N strips (TensorRT); by default 8 in blocks.", min=1),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="ulysses4, or ulysses2,ulysses4: engines for so many GPUs that divide the tokens."),
    ] = None,
    lora_slots: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Room for LoRAs of requests, in engines in blocks: the sum of their ranks."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Build the engines of an ONNX bundle for a target."""
    from engines.build import BuildOptions, build_engines

    if weights is not None:
        instead = {"external": "blocks", "embedded": "whole"}[weights]
        raise UserError(f"--weights {weights}", "a topology", f"write --topology {instead}")
    with bars() as progress:
        gpu = BuildOptions(target, size, frames, tf32, timing_cache, topology, vae_strips, parallel, lora_slots)
        options = replace(gpu, overwrite=overwrite, command=command_line())
        result = build_engines(bundle, engines, options, progress)
    build = result.manifest.build
    assert build is not None
    cost = f"{build.seconds:.1f} s, {human_bytes(build.peak_rss_bytes)} of memory"
    summary = f"{build.target} ({build.backend} {build.backend_version}, {cost})"
    console.print(f"{result.manifest.spec.name} {result.manifest.precision_text} for {summary}: {engines}")
    graphs = [component.graph for component in result.manifest.components]
    graphs += [stage.graph for component in result.manifest.components for stage in component.stages]
    sizes = {graph.path: graph.size_bytes for graph in graphs}
    console.print(", ".join(f"{path} {human_bytes(size)}" for path, size in sizes.items()))
    if topology is None and build.options.get("topology") == "whole":
        console.print("topology whole: the blocks of this export do not compute alike, or it is of an older version")
    for component, nodes in build.nodes.items():
        console.print(f"{component}, all with CUDA kernels: {nodes}", highlight=False)
