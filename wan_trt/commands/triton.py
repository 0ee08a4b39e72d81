"""``wan-trt triton``: engines → Triton model repository."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wan_trt.arguments import Overwrite
from wan_trt.console import console

Topology = Annotated[
    Literal["owner", "bls"], typer.Option(help="One model that owns the engines, or a model per engine.")
]
GpuMemory = Annotated[float | None, typer.Option(help="GiB of the GPU, for bls; the target's unless given.")]
Limit = Annotated[
    int | None, typer.Option(help="Largest request; sizes are the model's largest official one unless given.")
]


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    repository: Annotated[Path, typer.Argument(help="Folder to write the repository to.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name to serve the model under.")] = "wan22",
    topology: Topology = "owner",
    gpu_memory: GpuMemory = None,
    engines_at: Annotated[str, typer.Option(help="Where the engines lie on the server, if not where they are.")] = "",
    max_pixels: Limit = None,
    max_frames: Limit = None,
    max_steps: Limit = None,
    max_prompt_bytes: Limit = None,
    max_image_bytes: Limit = None,
    queue_size: Annotated[int, typer.Option(help="Jobs that may wait, per priority.", min=1)] = 8,
    longest_job: Annotated[int, typer.Option(help="Seconds a job may run, and a shutdown waits.", min=1)] = 3600,
    one_expert: Annotated[bool, typer.Option("--one-expert", help="Keep one expert in memory at a time.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Package engines as a Triton model repository."""
    from triton_repo.bls_repository import largest_call_bytes
    from triton_repo.repository import RepositoryOptions, write_repository

    options = RepositoryOptions(
        name,
        topology,
        limits={
            "max_pixels": max_pixels,
            "max_frames": max_frames,
            "max_steps": max_steps,
            "max_prompt_bytes": max_prompt_bytes,
            "max_image_bytes": max_image_bytes,
            "max_queue_size": queue_size,
            "longest_job_s": longest_job,
        },
        engines_at=engines_at,
        keep_experts=not one_expert,
        memory_gib=memory_gib(engines, topology, gpu_memory),
        overwrite=overwrite,
    )
    written = write_repository(engines, repository, options)
    console.print(f"{written.bundle.manifest.spec.name} as Triton model {name}: {repository}")
    if topology == "bls":
        mebibytes = largest_call_bytes(written.bundle, written.limits) / 2**20
        console.print(f"its largest engine call moves {mebibytes:.0f} MiB through /dev/shm: give it 3 times that")


def memory_gib(engines: Path, topology: str, given: float | None) -> float:
    """Memory of the GPU that must hold all ``engines`` at once; 0 where there is no such thing."""
    from engines.targets import target_named
    from wan22.bundle import read_manifest

    if given is not None or topology == "owner":
        return given or 0.0
    build = read_manifest(engines, "engines").build
    return target_named(build.target).memory_gib if build else 0.0
