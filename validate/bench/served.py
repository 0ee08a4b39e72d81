"""What a Triton server adds to a run: the same job in this process and through a server, in turns; and how soon it
lets go of a job that nobody wants any more.

Both sides are warm, take the same request and end with the bytes of the file. Each has the machine to itself while it
works. The server's side is what a client waits for: the request's way there, the queue, progress events, the way back.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from runtime.built_for import completed
from runtime.generate import generate
from runtime.pipeline import Pipeline
from runtime.request import Request
from triton_repo import probe
from triton_repo.bls_repository import CPU
from triton_repo.client import WanClient
from triton_repo.installation import Installation
from triton_repo.repository import RepositoryOptions, Topology, is_for_gpu, write_repository
from triton_repo.server import ServeOptions, free_ports, running
from validate.bench.machine import load_average, machine, versions
from validate.bench.samples import Samples, in_turns
from validate.bench.served_result import BEYOND_STEP, DIRECT, OVERHEAD, SERVED, TARGETS, Cancel, ServedBench
from validate.gate import read_gates
from validate.options import with_samples
from wan22.bundle import Manifest, open_bundle
from wan22.files import scratch_folder
from wan22.progress import Progress, silent
from wan22.residency import ResidencyChoice

CANCELS, CANCEL_AFTER, CANCEL_STEPS = 10, 5, 100
RUNS, STEPS = 10, 10
POLL_S = 0.002


@dataclass(frozen=True)
class ServedOptions:
    request: Request = field(default_factory=Request)  # of STEPS unless it says; see validate.options.with_samples
    # what is measured
    topology: Topology = "owner"
    runs: int = RUNS  # of each side
    warmup: int = 2  # runs of each side before them
    gate: Path | None = None  # TOML, see validate.gate; None: the targets
    residency: ResidencyChoice = "auto"  # what stays loaded of the engines, on each side
    # for the record
    command: str = ""


@dataclass
class Server:
    """A served model, and the questions that a bench has for it."""

    client: WanClient
    metrics_url: str
    inside_s: list[float] = field(default_factory=list)
    latents_sha256: str = ""

    def make(self, request: Request) -> bytes:
        result = self.client.submit(request).result()
        self.inside_s.append(float(result.event["seconds"]))
        self.latents_sha256 = result.event["latents_sha256"]
        return result.video

    def cancel(self, request: Request) -> Cancel:
        """Gives a long job up after a few steps.

        Raises:
            RuntimeError: the job went on to its end.
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
    """The same without a server, in this process."""

    pipeline: Pipeline
    folder: Path
    latents_sha256: str = ""

    def make(self, request: Request) -> bytes:
        made = generate(self.pipeline, request, self.folder / "video.mp4")
        self.latents_sha256 = hashlib.sha256(made.latents.tobytes()).hexdigest()
        return made.path.read_bytes()


def _request(options: ServedOptions, manifest: Manifest) -> Request:
    """The job, complete enough to be the same on both sides."""
    steps = STEPS if options.request.steps is None else options.request.steps
    return with_samples(replace(options.request, steps=steps), manifest)


def bench_served(
    engines: Path,
    options: ServedOptions,
    installation: Installation,
    environment: Mapping[str, str],
    progress: Progress = silent,
) -> ServedBench:
    """Runs both sides in turns.

    Args:
        engines: the bundle that both sides run.
        options: the job, and how often.
        installation: the server.
        environment: variables of its process.
        progress: told of every pair of runs.

    Raises:
        UserError: a request that the model cannot do, a gate that this does not measure, a server that does not start.
    """
    gates = read_gates(options.gate, "bench", (OVERHEAD, BEYOND_STEP)) if options.gate else TARGETS
    manifest = open_bundle(engines, "engines").manifest
    request = _request(options, manifest)
    complete = completed(request, manifest)
    facts = {
        "model": manifest.spec.name, "topology": options.topology, "width": complete.width, "height": complete.height,
        "frames": complete.frames, "steps": complete.steps, "runs": options.runs, "machine": machine(),
        "load_average": load_average(), "versions": versions(), "command": options.command,
    }  # fmt: skip
    with (
        scratch_folder("bench") as folder,
        _served(engines, folder, options, installation, environment) as server,
        Pipeline.open(engines, residency=options.residency) as pipeline,
    ):
        direct = Direct(pipeline, folder)
        sides = {DIRECT: lambda: direct.make(request), SERVED: lambda: server.make(request)}
        in_turns(sides, options.warmup)
        server.inside_s.clear()
        samples = _shown(sides, options.runs, progress)
        cancels = tuple(server.cancel(request) for _ in range(CANCELS))
        same = server.latents_sha256 == direct.latents_sha256
        return ServedBench(facts, samples, tuple(server.inside_s), cancels, same, gates)


def _shown(sides: Mapping[str, Callable[[], bytes]], runs: int, progress: Progress) -> dict[str, Samples]:
    """Both sides in turns, with progress."""
    last, done = list(sides)[-1], 0

    def counted(work: Callable[[], bytes]) -> bytes:
        nonlocal done
        done += 1
        progress("runs", done, runs)
        return work()

    return in_turns({name: partial(counted, work) if name == last else work for name, work in sides.items()}, runs)


@contextmanager
def _served(
    engines: Path, folder: Path, options: ServedOptions, installation: Installation, environment: Mapping[str, str]
) -> Iterator[Server]:
    """A server of ``engines`` on free ports of loopback, ready, and a client."""
    repository = folder / "repository"
    written = write_repository(
        engines, repository, RepositoryOptions(topology=options.topology, residency=options.residency)
    )
    variant = CPU if options.topology == "bls" and not is_for_gpu(written.bundle) else ""
    http, grpc, metrics = free_ports(3)
    serve = ServeOptions("127.0.0.1", http, grpc, metrics, variant, quiet=True)
    with (
        running(installation, repository, written.limits, serve, environment) as server,
        WanClient(f"127.0.0.1:{serve.grpc_port}") as client,
    ):
        server.wait_until_ready()
        yield Server(client, f"http://127.0.0.1:{serve.metrics_port}/metrics")
