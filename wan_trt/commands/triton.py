"""``wan-trt triton``: engines → Triton model repository."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from wan22.errors import UserError
from wan22.files import check_room
from wan22.outputs import check_no_source
from wan_trt import arguments as given
from wan_trt import memory_options
from wan_trt.console import console, report_unstamped

POD_OPTIONS = {
    "image": "wan-trt:26.07",
    "gateway_image": "wan-trt-gateway:0.1.0",
    "database_secret": "",
    "namespace": "wan22",
    "prometheus": "http://prometheus-server.monitoring.svc",
}  # defaults of what --kubernetes alone uses
MAX_PODS = 4
Prometheus = Annotated[str, typer.Option(help="URL from which the autoscaler reads metrics.")]
GatewayImage = Annotated[str, typer.Option(help="Image of the gateway's pods: the target gateway of Containerfile.")]
DatabaseSecret = Annotated[
    str, typer.Option(help="Secret whose key url is postgresql://..., for two gateways; by default one with SQLite.")
]


@given.with_options(given.LIMITS, memory_options.OPTIONS)
def run(
    engines: given.Engines,
    repository: Annotated[Path, typer.Argument(help="Folder to write the repository to.", show_default=False)],
    name: given.ServedName = "wan22",
    topology: given.Topology = "owner",
    gpu_memory: given.GpuMemory = None,
    engines_at: Annotated[str, typer.Option(help="Path of the engines on the server, if it differs.")] = "",
    queue_size: given.QueueSize = 8,
    longest_job: given.LongestJob = 3600,
    residency: given.Residency = "auto",
    require_signature: given.RequireSignature = None,
    kubernetes: Annotated[Path | None, typer.Option(help="Folder to write Kubernetes manifests to as well.")] = None,
    image: Annotated[
        str, typer.Option(help="Image of the pods: tritonserver 26.07 or later with wan-trt installed.")
    ] = POD_OPTIONS["image"],
    gateway_image: GatewayImage = POD_OPTIONS["gateway_image"],
    database_secret: DatabaseSecret = POD_OPTIONS["database_secret"],
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace of the pods.")] = POD_OPTIONS["namespace"],
    max_pods: Annotated[int, typer.Option(help="Maximum number of pods for the autoscaler.", min=1)] = MAX_PODS,
    prometheus: Prometheus = POD_OPTIONS["prometheus"],
    overwrite: given.Overwrite = False,
    **shared: Any,
) -> None:
    """Package engines as a Triton model repository."""
    limits = given.limits_of(locals() | shared)
    given.check_signed(engines, require_signature)
    from triton_repo.bls_repository import largest_call_bytes
    from triton_repo.gateway_manifests import GatewayPods
    from triton_repo.manifests import ClusterOptions, write_manifests
    from triton_repo.pod import ENGINES_AT
    from triton_repo.probe import DRAIN_FLAG
    from triton_repo.repository import MARK, RepositoryOptions, write_repository

    if kubernetes is None:
        _refuse_without_pods(locals())
    options = RepositoryOptions(
        name,
        topology,
        limits=limits,
        engines_at=engines_at or (ENGINES_AT if kubernetes else ""),
        residency=residency,
        drain_flag=str(DRAIN_FLAG) if kubernetes else "",
        memory_gib=memory_gib(engines, topology, gpu_memory),
        overwrite=overwrite,
        blocks=memory_options.blocks_options(shared),
    )
    cluster = ClusterOptions(image, namespace, max_pods, prometheus, GatewayPods(gateway_image, database_secret))
    if kubernetes is not None:
        check_no_source(kubernetes, engines)
        if kubernetes.absolute() == repository.absolute():
            raise UserError(f"{kubernetes} for repository and manifests", "a folder for each", "choose another")
        check_room(kubernetes, MARK if overwrite else "")
    written = write_repository(engines, repository, options)
    console.print(f"{written.bundle.manifest.spec.name} as Triton model {name}: {repository}")
    report_unstamped(written.unread)
    if kubernetes is not None:
        write_manifests(kubernetes, written, options, cluster)
        console.print(f"manifests: {kubernetes}")
    if topology == "bls":
        mebibytes = largest_call_bytes(written.bundle, written.limits) / 2**20
        console.print(f"its largest engine call moves {mebibytes:.0f} MiB through /dev/shm: reserve 3 times that")


def _refuse_without_pods(options: Mapping[str, Any]) -> None:
    """Refuse options of manifests that are not written."""
    unused = [name for name, usual in (POD_OPTIONS | {"max_pods": MAX_PODS}).items() if options[name] != usual]
    if unused:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{found} without --kubernetes", "a folder for manifests", "add --kubernetes FOLDER")


def memory_gib(engines: Path, topology: str, stated: float | None) -> float:
    """GiB of the GPU that must hold all ``engines`` at once; 0 if unknown or not needed."""
    from engines.targets import target_named
    from wan22.bundle import read_manifest

    if stated is not None or topology == "owner":
        return stated or 0.0
    build = read_manifest(engines, "engines").build
    return target_named(build.target).memory_gib if build else 0.0
