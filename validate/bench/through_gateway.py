"""What a gateway adds: to a status request, to a job, and to its own memory over many jobs.

The same job goes to Triton directly and through the gateway, in turns; both sides are over when the client has the
file. Status requests come at a fixed rate whether or not earlier ones are answered, and their time counts from the
moment at which they were due, so a slow gateway cannot thin them out.
"""

import http.client
import os
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gateway.client import GatewayClient, RefusedError
from gateway.start import GatewayOptions, run_gateway
from gateway.sweep import Keep
from runtime.request import CompleteRequest
from triton_repo.installation import Installation
from triton_repo.server import free_ports
from validate.bench.child_process import child_process
from validate.bench.gateway_result import DIRECT, GATEWAY, KNOWN, TARGETS, GatewayBench
from validate.bench.machine import load_average
from validate.bench.samples import in_turns
from validate.bench.served import start_server
from validate.bench.two_sides import ServedOptions
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.progress import Progress, silent

RATE, STATUS_S = 200, 5.0  # status requests per second, and for how long
CONNECTIONS = 8
CLIENTS = 4  # that make the many jobs
KEPT = 50  # videos at a time
READY_S = 60.0


class Client(GatewayClient):
    def make(self, fields: Mapping[str, Any]) -> tuple[str, bytes]:
        """The id and the file of a new video, whose events are followed. Raises RuntimeError if its job failed."""
        video_id = str(self.create(fields, uuid.uuid4().hex)["id"])
        events = self.ask("GET", f"/v1/videos/{video_id}/events")[0]  # the stream ends with the job
        if b"event: completed" not in events:
            raise RuntimeError(f"a job ended so: {events[-300:].decode(errors='replace')}")
        return video_id, self.content(video_id)


def bench_gateway(
    engines: Path,
    options: ServedOptions,
    jobs: int,
    installation: Installation,
    environment: Mapping[str, str],
    progress: Progress = silent,
) -> GatewayBench:
    """Start a Triton server and a gateway in front of it, and measure.

    Args:
        engines: the bundle that is served.
        options: the job and the number of runs.
        jobs: number of jobs, the smallest possible with one step, over which memory is watched.
        installation: the server.
        environment: environment variables of the server's process.
        progress: called for every pair of runs and every job.

    Raises:
        UserError: the model cannot serve the request, a gate has an unknown measurement, or nothing starts.
    """
    gates = options.gates(KNOWN, TARGETS)
    manifest = open_bundle(engines, "engines").manifest
    if manifest.spec.takes.image == "required":
        raise UserError(f"{manifest.spec.name}, which starts from an image", "a model of text", "name other engines")
    request, complete, facts = options.job(manifest)
    facts |= {"jobs": jobs, "rate_per_s": RATE}
    with scratch_folder("bench") as folder, start_server(engines, folder, options, installation, environment) as server:
        (port,) = free_ports(1)
        gateway = GatewayOptions(folder / "gateway", (server.url,), port=port, keep=Keep(videos=KEPT))
        with child_process(_serve, gateway) as (ready, process):
            client = Client(f"http://127.0.0.1:{port}", timeout_s=600)
            _until_ready(client, ready)
            fields, videos = _fields(complete), {}
            sides = {
                DIRECT: lambda: videos.update({DIRECT: server.make(request)}),
                GATEWAY: lambda: videos.update({GATEWAY: client.make(fields)[1]}),
            }
            in_turns(sides, options.warmup)
            samples = in_turns(sides, options.runs)
            progress("runs", options.runs, options.runs)
            video_id, _ = client.make(fields)
            floor = answer_times(port, "/health", RATE, STATUS_S)
            pid = process.pid or 0
            clock = [processor_s(pid)]
            status = answer_times(port, f"/v1/videos/{video_id}", RATE, STATUS_S)
            clock.append(processor_s(pid))
            rss = _watched(client, {**fields, "num_inference_steps": 1}, jobs, pid, progress)
            clock.append(processor_s(pid))
    facts["processor_ms_per_status"] = 1000 * (clock[1] - clock[0]) / len(status)
    facts["processor_ms_per_job"] = 1000 * (clock[2] - clock[1]) / jobs
    facts["load_average_after"] = load_average()
    return GatewayBench(facts, samples, floor, status, rss, videos[DIRECT] == videos[GATEWAY], gates)


def _serve(ready: Connection, options: GatewayOptions) -> None:
    run_gateway(options, lambda: ready.send(True))


def _until_ready(client: Client, ready: Connection) -> None:
    if not ready.poll(READY_S):
        raise UserError("a gateway that is not ready", f"one within {READY_S:.0f} s", "run wan-trt gateway to see why")
    until = time.monotonic() + READY_S
    while True:
        try:
            client.ask("GET", "/ready")
            return
        except RefusedError as error:
            if time.monotonic() > until:
                raise UserError(f"{error}", "a server that is ready", "run wan-trt serve to see why") from None
        time.sleep(0.05)


def _fields(complete: CompleteRequest) -> dict[str, Any]:
    """The job as a client of ``/v1/videos`` asks for it."""
    return {
        "prompt": complete.prompt, "size": f"{complete.width}x{complete.height}", "num_frames": complete.frames,
        "num_inference_steps": complete.steps, "seed": complete.seed,
    }  # fmt: skip


def answer_times(port: int, path: str, rate: float, seconds: float) -> list[float]:
    """Ask for ``path`` at ``rate`` per second for ``seconds``; the seconds that each answer took.

    Raises:
        RuntimeError: an answer other than 200.
    """
    taken: list[float] = []
    start, total = time.perf_counter() + 0.1, int(rate * seconds)

    def ask(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for number in range(first, total, CONNECTIONS):
            due = start + number / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"GET {path}: {answer.status}")
            taken.append(time.perf_counter() - due)
        connection.close()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(ask, range(CONNECTIONS)))
    return taken


def _watched(
    client: Client, fields: Mapping[str, Any], jobs: int, pid: int, progress: Progress
) -> list[tuple[int, int]]:
    """Make ``jobs`` videos with a few clients; the gateway's resident bytes after each."""
    found: list[tuple[int, int]] = []
    lock = threading.Lock()

    def make(_number: int) -> None:
        client.make(fields)
        with lock:
            found.append((len(found) + 1, resident_bytes(pid)))
            progress("jobs", len(found), jobs)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(make, range(jobs)))
    return found


def processor_s(pid: int) -> float:
    """Processor time of all threads of a process, which other processes on the machine hardly change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
