"""``wan-trt triton``: engines → Triton model repository."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wan22.errors import UserError
from wan_trt.arguments import Overwrite, Residency
from wan_trt.console import console, tell_unread

Topology = Annotated[
    Literal["owner", "bls"], typer.Option(help="One model that owns the engines, or a model per engine.")
]
GpuMemory = Annotated[float | None, typer.Option(help="GiB of the GPU, for bls; the target's unless given.", min=0)]
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
    residency: Residency = "auto",
    kubernetes: Annotated[Path | None, typer.Option(help="Folder to write Kubernetes manifests to as well.")] = None,
    image: Annotated[
        str, typer.Option(help="Of the pods: tritonserver 26.07 or later with wan-trt installed.")
    ] = "wan-trt:26.07",
    max_pods: Annotated[int, typer.Option(help="Most pods that the autoscaler may make.", min=1)] = 4,
    prometheus: Annotated[
        str, typer.Option(help="Where the autoscaler reads metrics.")
    ] = "http://prometheus-server.monitoring.svc",
    overwrite: Overwrite = False,
) -> None:
    """Package engines as a Triton model repository."""
    from triton_repo.bls_repository import largest_call_bytes
    from triton_repo.manifests import ENGINES_AT, ClusterOptions, check_image, write_manifests
    from triton_repo.probe import DRAIN_FLAG
    from triton_repo.repository import RepositoryOptions, make_room, write_repository

    limits = limits_of(max_pixels, max_frames, max_steps, max_prompt_bytes, max_image_bytes, queue_size, longest_job)
    options = RepositoryOptions(
        name,
        topology,
        limits=limits,
        engines_at=engines_at or (ENGINES_AT if kubernetes else ""),
        residency=residency,
        drain_flag=str(DRAIN_FLAG) if kubernetes else "",
        memory_gib=memory_gib(engines, topology, gpu_memory),
        overwrite=overwrite,
    )
    if kubernetes is not None:
        check_image(image)
        if kubernetes.absolute() == repository.absolute():
            raise UserError(f"{kubernetes} for repository and manifests", "a folder for each", "choose another")
        make_room(kubernetes, overwrite=overwrite)
    written = write_repository(engines, repository, options)
    console.print(f"{written.bundle.manifest.spec.name} as Triton model {name}: {repository}")
    tell_unread(written.unread)
    if kubernetes is not None:
        write_manifests(kubernetes, written, options, ClusterOptions(image, max_pods, prometheus))
        console.print(f"manifests: {kubernetes}")
    if topology == "bls":
        mebibytes = largest_call_bytes(written.bundle, written.limits) / 2**20
        console.print(f"its largest engine call moves {mebibytes:.0f} MiB through /dev/shm: give it 3 times that")


def limits_of(
    max_pixels: int | None,
    max_frames: int | None,
    max_steps: int | None,
    max_prompt_bytes: int | None,
    max_image_bytes: int | None,
    queue_size: int,
    longest_job: int,
) -> dict[str, int | None]:
    """What no request may exceed, by the names of :class:`triton_repo.settings.Limits`; None: the model's own."""
    return {
        "max_pixels": max_pixels,
        "max_frames": max_frames,
        "max_steps": max_steps,
        "max_prompt_bytes": max_prompt_bytes,
        "max_image_bytes": max_image_bytes,
        "max_queue_size": queue_size,
        "longest_job_s": longest_job,
    }


def memory_gib(engines: Path, topology: str, given: float | None) -> float:
    """Memory of the GPU that must hold all ``engines`` at once; 0 where there is no such thing."""
    from engines.targets import target_named
    from wan22.bundle import read_manifest

    if given is not None or topology == "owner":
        return given or 0.0
    build = read_manifest(engines, "engines").build
    return target_named(build.target).memory_gib if build else 0.0
