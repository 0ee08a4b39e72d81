"""``wan-trt serve``: engines behind a Triton server on this machine."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Residency
from wan_trt.commands.triton import GpuMemory, Limit, Topology, limits_of, memory_gib
from wan_trt.console import console, tell_unread


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    server: Annotated[Path | None, typer.Option(help="The tritonserver to start, if not the first found.")] = None,
    environment: Annotated[Path | None, typer.Option(help="Environment with the nvidia-pytriton wheel.")] = None,
    name: Annotated[str, typer.Option(help="Name to serve the model under.")] = "wan22",
    topology: Topology = "owner",
    gpu_memory: GpuMemory = None,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="For health and server-sent events.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="For wan-trt client.", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="For Prometheus.", min=1, max=65535)] = 8002,
    max_pixels: Limit = None,
    max_frames: Limit = None,
    max_steps: Limit = None,
    max_prompt_bytes: Limit = None,
    max_image_bytes: Limit = None,
    queue_size: Annotated[int, typer.Option(help="Jobs that may wait, per priority.", min=1)] = 8,
    longest_job: Annotated[int, typer.Option(help="Seconds a job may run, and a shutdown waits.", min=1)] = 3600,
    max_silence: Annotated[
        float, typer.Option(help="Seconds without a sign of the model before it counts as dead.", min=1)
    ] = 120,
    residency: Residency = "auto",
) -> int:
    """Serve engines until Ctrl-C or SIGTERM; the running job is finished first, a second Ctrl-C ends it."""
    from triton_repo.bls_repository import CPU
    from triton_repo.installation import default_environments, find_installation
    from triton_repo.repository import RepositoryOptions, is_for_gpu, write_repository
    from triton_repo.server import ServeOptions, running, wait_until_ready, watch

    environments = default_environments() if environment is None else (environment,)
    installation = find_installation(environments, server)
    limits = limits_of(max_pixels, max_frames, max_steps, max_prompt_bytes, max_image_bytes, queue_size, longest_job)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="wan22-") as folder:
        repository = Path(folder, "repository")
        packing = RepositoryOptions(
            name,
            topology,
            limits,
            residency=residency,
            memory_gib=memory_gib(engines, topology, gpu_memory),
        )
        written = write_repository(engines, repository, packing)
        tell_unread(written.unread)
        variant = CPU if topology == "bls" and not is_for_gpu(written.bundle) else ""
        options = ServeOptions(address, http_port, grpc_port, metrics_port, variant)
        try:
            with running(installation, repository, written.limits, options, os.environ) as process:
                wait_until_ready(process, options)
                console.print(f"{name} is ready: wan-trt client {address}:{grpc_port} PROMPT -o out.mp4")
                return watch(process, options, max_silence)
        except KeyboardInterrupt:
            return 0
