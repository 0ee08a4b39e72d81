"""``wan-trt serve``: engines behind a Triton server on this machine."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan_trt import arguments as given
from wan_trt import memory_options
from wan_trt.commands.triton import memory_gib
from wan_trt.console import bars, console, report_unstamped

if TYPE_CHECKING:
    from triton_repo.repository import RepositoryOptions
    from triton_repo.server import ServeOptions, Server

Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE[:EXPERT[:STRENGTH]]",
        help="LoRA that requests may choose by its name, merged at the start; repeat it for more.",
    ),
]


@given.with_options(given.LIMITS, memory_options.OPTIONS)
def run(
    engines: given.Engines,
    server: Annotated[Path | None, typer.Option(help="The tritonserver to start; by default the first found.")] = None,
    environment: Annotated[Path | None, typer.Option(help="Environment with the nvidia-pytriton wheel.")] = None,
    name: given.ServedName = "wan22",
    topology: given.Topology = "owner",
    gpu_memory: given.GpuMemory = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="For health and server-sent events.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="For wan-trt client.", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="For Prometheus.", min=1, max=65535)] = 8002,
    queue_size: given.QueueSize = 8,
    longest_job: given.LongestJob = 3600,
    max_silence: Annotated[
        float, typer.Option(help="Seconds without a heartbeat after which a model counts as dead.", min=1)
    ] = 120,
    residency: given.Residency = "auto",
    lora: Loras = None,
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint for --lora, if it has moved.")] = None,
    require_signature: given.RequireSignature = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Triton's log.")] = False,
    **shared: Any,
) -> int:
    """Serve engines from Triton until Ctrl-C or SIGTERM.

    The running job is finished first; a second Ctrl-C ends it.
    """
    limits = given.limits_of(locals() | shared)
    given.check_signed(engines, require_signature)
    from triton_repo.repository import RepositoryOptions
    from triton_repo.server import ServeOptions

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    options = ServeOptions(address, http_port, grpc_port, metrics_port, quiet=not verbose)
    packing = RepositoryOptions(
        name,
        topology,
        limits,
        residency=residency,
        memory_gib=memory_gib(engines, topology, gpu_memory),
        blocks=memory_options.blocks_options(shared),
    )
    ready = f"{name} is ready: wan-trt client {address}:{grpc_port} PROMPT -o out.mp4"
    with starting(engines, packing, options, (environment, server), (lora or (), checkpoint)) as tritonserver:
        return _serve(tritonserver, ready, max_silence)


@contextmanager
def starting(
    engines: Path,
    packing: "RepositoryOptions",
    options: "ServeOptions",
    installed: tuple[Path | None, Path | None],
    loras: tuple[Sequence[str], str | None],
) -> "Iterator[Server]":
    """A server of ``engines`` that is starting; at the end of the block it stops.

    Args:
        engines: the bundle.
        packing: how its repository is written; LoRAs are added.
        options: of the server.
        installed: the environment and the tritonserver to use; None means the first found.
        loras: ``NAME=FILE...`` and where the checkpoint is now.
    """
    from triton_repo.bls_repository import CPU
    from triton_repo.driver import check_gpu
    from triton_repo.installation import default_environments, find_installation
    from triton_repo.repository import check_devices, is_for_gpu, write_repository
    from triton_repo.server import run_server
    from wan_trt.recipes.weight_sets import make_weight_sets, parse_named

    (environment, binary), (named, checkpoint) = installed, loras
    parsed = parse_named(named)
    check_gpu(engines)
    if parsed and packing.topology == "bls":
        raise UserError("--lora with --topology bls", "topology owner, which holds the weights", "leave one out")
    if parsed:  # merging takes minutes
        check_devices(open_bundle(engines, "engines"), packing, with_loras=True)
    installation = find_installation(default_environments() if environment is None else (environment,), binary)
    with scratch_folder("serve") as folder:
        with bars() as progress:
            sets = make_weight_sets(engines, folder / "loras", parsed, checkpoint, progress)
        written = write_repository(engines, folder / "repository", replace(packing, loras=sets))
        report_unstamped(written.unread)
        variant = CPU if packing.topology == "bls" and not is_for_gpu(written.bundle) else ""
        options = replace(options, config_name=variant)
        with run_server(installation, folder / "repository", written.limits, options, os.environ) as server:
            yield server


def _serve(server: "Server", ready: str, max_silence_s: float) -> int:
    """Wait until the server is ready, watch it until it ends, and return the exit code."""
    from triton_repo.process import end_group

    try:
        server.wait_until_ready()
        console.print(ready)
        return server.watch(max_silence_s)
    except KeyboardInterrupt:
        try:
            console.print("stopping: running and waiting jobs are finished first; Ctrl-C again ends them")
            server.stop()
        except KeyboardInterrupt:
            end_group(server.process)
            raise
        return 0
