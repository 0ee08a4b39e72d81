"""Run ``tritonserver`` with settings that are safe by default.

Only this machine can reach it, clients cannot load models or read traces, the size of requests is limited, and a stop
waits for the running job. Options unknown to the server's release are left out.
"""

import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from triton_repo import probe
from triton_repo.installation import Installation, backend_folder, stub_environment
from triton_repo.model_status import Models
from triton_repo.process import end_group, models_of, start_group, stop_group
from triton_repo.server_folder import close_regions, server_folder
from triton_repo.server_log import ServerLog
from triton_repo.settings import Limits
from wan22.errors import UserError

ADMIN_APIS = ("model-repository", "logging", "trace", "shared-memory")
# Triton takes a key only on its command line, which every user of the machine can read. No request can match this one,
# because a header's name cannot contain a line feed.
NO_KEY = "no\nheader=no\nvalue"
EXIT_MARGIN_S = 30  # after the longest job: unload, write the answer
KEEPALIVE_MS = 60_000
WATCH_EVERY_S = 1.0
LOAD_S = 1800  # time for a stub to open its engines


@dataclass(frozen=True)
class ServeOptions:
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    config_name: str = ""  # variant of the configurations, configs/NAME.pbtxt
    quiet: bool = False  # print only errors, and errors of a start only as the reason of its failure
    # unique, so that exactly this server's regions can be removed
    region_prefix: str = field(default_factory=lambda: f"wan22_{secrets.token_hex(4)}_")


def arguments(repository: Path, limits: Limits, options: ServeOptions, known: Set[str] | None = None) -> list[str]:
    """The command-line options of ``tritonserver``, limited to ``known`` ones; None means all."""
    closed = f"{','.join(ADMIN_APIS)}:{NO_KEY}"
    asked = {
        "model-repository": repository.absolute(),
        "model-control-mode": "none",
        "model-config-name": options.config_name,
        "disable-auto-complete-config": None,
        "exit-on-error": "true",
        "strict-readiness": "true",
        "exit-timeout-secs": limits.longest_job_s + EXIT_MARGIN_S,
        "http-address": options.address,
        "http-port": options.http_port,
        "http-restricted-api": closed,
        "http-max-input-size": 2 * limits.max_image_bytes,
        "grpc-address": options.address,
        "grpc-port": options.grpc_port,
        "grpc-restricted-protocol": closed,
        "grpc-keepalive-time": KEEPALIVE_MS,  # detects vanished clients, whose jobs are then cancelled
        "metrics-address": options.address,
        "metrics-port": options.metrics_port,
        "allow-sagemaker": "false",
        "allow-vertex-ai": "false",
        "allow-client-shm": "false",
        **(dict.fromkeys(("log-info", "log-warning"), "false") if options.quiet else {}),
    }
    kept = {name: value for name, value in asked.items() if value != "" and (known is None or name in known)}
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in kept.items()]
    backend = {"shm-region-prefix-name": options.region_prefix, "stub-timeout-seconds": LOAD_S}
    return [*flags, *(f"--backend-config=python,{k}={v}" for k, v in backend.items())]


def known_options(installation: Installation) -> set[str]:
    try:
        done = subprocess.run([installation.binary, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        found = f"{installation.binary}: {error.strerror}"
        raise UserError(found, "a tritonserver for this machine", "name another with --server") from None
    words = (line.split() for line in (done.stdout + done.stderr).splitlines())
    return {parts[0].removeprefix("--") for parts in words if parts and parts[0].startswith("--")}


@dataclass(frozen=True)
class Server:
    """A started ``tritonserver`` and the processes of its models."""

    process: "subprocess.Popen[bytes]"
    options: ServeOptions
    models: Models
    log: ServerLog
    stop_within_s: float

    def wait_until_ready(self, within_s: float = LOAD_S) -> None:
        """Return when the server reports that every model is ready.

        Raises:
            UserError: it ended early, or was not ready in time; with the reason.
        """
        give_up = time.monotonic() + within_s
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise self._not_started()
            if is_ready(f"http://{self.options.address}:{self.options.http_port}"):
                close_regions(self.options.region_prefix)
                self.log.show()
                return
            time.sleep(0.1)
        raise UserError(f"tritonserver not ready after {within_s:g} s", "models that load", "see its log")

    def _not_started(self) -> UserError:
        """The reason why the server ended: a model's failure, or else the first error in the log."""
        when = f"tritonserver {_ending(self.process)} before it was ready"
        failures = self.models.failures()
        if failures:
            found, expected, remedy = failures[0]
            return UserError(f"{found} ({when})", expected, remedy)
        reason = self.log.first_error()
        return UserError(f"{when}{reason and ': '}{reason}", "models that load", "see its log with --verbose")

    def watch(self, max_silence_s: float = probe.MAX_SILENCE_S) -> int:
        """Return 0 when the server ends by itself; kill it if a model has died, hangs or fails every job.

        Such a server reports that it is healthy, fails every job, and takes its full exit timeout to stop.

        Raises:
            UserError: a model died or hangs, or the server crashed.
        """
        url = f"http://{self.options.address}:{self.options.metrics_port}/metrics"
        while self.process.poll() is None:
            time.sleep(WATCH_EVERY_S)
            if dead := self.models.dead():
                trouble = f"the process of model {', '.join(dead)} died {self._working()}"
            else:
                try:
                    trouble = "; ".join(probe.confirmed_troubles(url, max_silence_s))
                except OSError:  # stopping or too busy to answer; the process shows which
                    continue
            if trouble and self.process.poll() is None:
                end_group(self.process)
                remedy = "see the server's log and start it again"
                raise UserError(f"{trouble}; server stopped", "working models", remedy)
        if self.process.returncode:
            found = f"tritonserver {_ending(self.process)} {self._working()}"
            raise UserError(found, "a server that runs until stopped", "start it again with --verbose and see its log")
        return 0

    def _working(self) -> str:
        jobs = self.models.jobs()
        return f"while job {', '.join(jobs)} ran" if jobs else "while no job ran, so no model saw the request"

    def stop(self) -> None:
        """See :func:`triton_repo.process.stop_group`."""
        stop_group(self.process, self.models, self.stop_within_s)


def _ending(process: "subprocess.Popen[bytes]") -> str:
    code = process.returncode
    return f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


@contextmanager
def run_server(
    installation: Installation, repository: Path, limits: Limits, options: ServeOptions, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Start a server; at the end of the block, stop it and remove its shared memory.

    Its output goes to this process's output. It runs in a separate session, so that it gets one SIGTERM on Ctrl-C, and
    it ends when the calling thread or process is killed.

    Raises:
        UserError: a port is in use, the address is empty, or the server is not executable.
    """
    for port in (options.http_port, options.grpc_port, options.metrics_port):
        _check_free(options.address, port)
    known = known_options(installation)
    with server_folder(options.region_prefix) as (folder, lock), backend_folder(installation) as backends:
        asked = arguments(repository, limits, options, known)
        command = [str(installation.binary), *asked, *([f"--backend-directory={backends}"] if backends else [])]
        output = subprocess.PIPE if options.quiet else None
        process = start_group(command, stub_environment(installation, environment), folder, lock, output)
        within_s = limits.longest_job_s + 2 * EXIT_MARGIN_S
        server = Server(process, options, models_of(folder), ServerLog(process.stdout), within_s)
        try:
            yield server
        finally:
            server.stop()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in probes:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in probes]


def _check_free(address: str, port: int) -> None:
    if not address:  # the server would listen on all addresses
        raise UserError("an empty address", "an address to listen on", "use 127.0.0.1 for this machine alone")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(f"{address}:{port}: {error.strerror}", "a free port", "choose another") from None
