"""The overhead of a Triton server: the same job in this process and through a server, in turns.

The latency of cancelling a job is measured as well. Both sides are warm, take the same request
and return the bytes of the video file. Only one runs at a time. The served time is what a client waits for: sending
the request, the queue, progress events and the response.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from triton_repo import probe
from triton_repo.bls_repository import CPU
from triton_repo.client import WanClient
from triton_repo.installation import Installation
from triton_repo.repository import RepositoryOptions, is_for_gpu, write_repository
from triton_repo.server import ServeOptions, free_ports, run_server
from validate.bench.samples import Samples, in_turns
from validate.bench.served_result import DIRECT, KNOWN, SERVED, TARGETS, Cancel, ServedBench
from validate.bench.two_sides import ServedOptions
from wan22.bundle import open_bundle
from wan22.files import scratch_folder
from wan22.progress import Progress, silent

CANCEL_AFTER, CANCEL_STEPS = 5, 1000  # the most that a run can have: the cancellation always comes before its end
POLL_S = 0.002


@dataclass
class Server:
    """A served model and its bench operations."""

    client: WanClient
    url: str  # gRPC address
    metrics_url: str
    inside_s: list[float] = field(default_factory=list)
    latents_sha256: str = ""

    def make(self, request: Request) -> bytes:
        result = self.client.submit(request).result()
        self.inside_s.append(float(result.event["seconds"]))
        self.latents_sha256 = result.event["latents_sha256"]
        return result.video

    def cancel(self, request: Request) -> Cancel:
        """Cancel a long job after a few steps.

        Raises:
            RuntimeError: the job ran to its end.
        """
        ticks: list[float] = []
        before = self._metric("wan22_steps_total")
        with self.client.submit(replace(request, steps=CANCEL_STEPS)) as job:
            for event in job.events():
                if event["phase"] == "denoise":
                    ticks.append(time.perf_counter())
                if len(ticks) == CANCEL_AFTER:
                    break
        while self._metric(probe.IN_FLIGHT):
            time.sleep(POLL_S)
        latency = time.perf_counter() - ticks[-1]
        if self._metric("wan22_steps_total") - before >= CANCEL_STEPS:
            raise RuntimeError("the job was not cancelled")
        return Cancel(latency, float(np.median(np.diff(ticks))))

    def _metric(self, name: str) -> float:
        return sum(probe.read(self.metrics_url)[name])


@dataclass
class Direct:
    """The same job in this process, without a server."""

    pipeline: Pipeline
    folder: Path
    latents_sha256: str = ""

    def make(self, request: Request) -> bytes:
        made = generate(self.pipeline, request, self.folder / "video.mp4")
        self.latents_sha256 = hashlib.sha256(made.latents.tobytes()).hexdigest()
        return made.path.read_bytes()


def bench_served(
    engines: Path,
    options: ServedOptions,
    installation: Installation,
    environment: Mapping[str, str],
    progress: Progress = silent,
) -> ServedBench:
    """Run both sides in turns, then cancel a few jobs.

    Args:
        engines: the bundle that both sides run.
        options: the job and the number of runs.
        installation: the server.
        environment: environment variables of the server's process.
        progress: called for every pair of runs.

    Raises:
        UserError: the model cannot serve the request, a gate has an unknown measurement, or the server fails to start.
    """
    gates = options.gates(KNOWN, TARGETS)
    request, _, facts = options.job(open_bundle(engines, "engines").manifest)
    with (
        scratch_folder("bench") as folder,
        start_server(engines, folder, options, installation, environment) as server,
        Pipeline.open(engines, residency=options.residency, blocks=options.blocks) as pipeline,
    ):
        direct = Direct(pipeline, folder)
        sides = {DIRECT: lambda: direct.make(request), SERVED: lambda: server.make(request)}
        in_turns(sides, options.warmup)
        server.inside_s.clear()
        samples = _run_with_progress(sides, options.runs, progress)
        cancels = tuple(server.cancel(request) for _ in range(options.cancels))
        same = server.latents_sha256 == direct.latents_sha256
        return ServedBench(
            facts | {"topology": options.topology}, samples, tuple(server.inside_s), cancels, same, gates
        )


def _run_with_progress(sides: Mapping[str, Callable[[], bytes]], runs: int, progress: Progress) -> dict[str, Samples]:
    """Run both sides in turns and report progress."""
    last, done = list(sides)[-1], 0

    def count_run(work: Callable[[], bytes]) -> bytes:
        nonlocal done
        done += 1
        progress("runs", done, runs)
        return work()

    return in_turns({name: partial(count_run, work) if name == last else work for name, work in sides.items()}, runs)


@contextmanager
def start_server(
    engines: Path, folder: Path, options: ServedOptions, installation: Installation, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Start a server of ``engines`` on free loopback ports; yields it with a client when it is ready."""
    repository = folder / "repository"
    settings = RepositoryOptions(
        topology=options.topology,
        limits={"max_steps": CANCEL_STEPS},
        residency=options.residency,
        blocks=options.blocks,
    )
    written = write_repository(engines, repository, settings)
    variant = CPU if options.topology == "bls" and not is_for_gpu(written.bundle) else ""
    http, grpc, metrics = free_ports(3)
    serve = ServeOptions("127.0.0.1", http, grpc, metrics, variant, quiet=True)
    with (
        run_server(installation, repository, written.limits, serve, environment) as server,
        WanClient(f"127.0.0.1:{serve.grpc_port}") as client,
    ):
        server.wait_until_ready()
        yield Server(client, f"127.0.0.1:{serve.grpc_port}", f"http://127.0.0.1:{serve.metrics_port}/metrics")
