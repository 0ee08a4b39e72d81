"""Running ``tritonserver`` with settings that are safe to begin with, until it is told to stop.

Nobody but this machine can reach it, nobody can load models or read traces, what a request may weigh is bounded, and a
stop waits for the running job. Options that a release of the server does not know yet are left out.
"""

import secrets
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
from triton_repo.settings import Limits
from triton_repo.start import remove_regions
from wan22.errors import UserError

ADMIN_APIS = ("model-repository", "logging", "trace", "shared-memory")
EXIT_MARGIN_S = 30  # beyond the longest job: unloading, writing the answer
KEEPALIVE_MS = 60_000
WATCH_EVERY_S = 1.0
LOAD_S = 1800  # for a stub to open its engines


@dataclass(frozen=True)
class ServeOptions:
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    config_name: str = ""  # variant of the configurations, configs/NAME.pbtxt
    quiet: bool = False  # log errors only
    # an own prefix tells the regions of this server from anybody else's, so that they can be cleaned up
    region_prefix: str = field(default_factory=lambda: f"wan22_{secrets.token_hex(4)}_")


def arguments(
    repository: Path, limits: Limits, options: ServeOptions, admin_key: str, known: Set[str] | None = None
) -> list[str]:
    """The options of ``tritonserver``, of those that its release has ``known``; None: of all."""
    admin = f"{','.join(ADMIN_APIS)}:wan22-admin={admin_key}"
    asked = {
        "model-repository": repository,
        "model-control-mode": "none",
        "model-config-name": options.config_name,
        "disable-auto-complete-config": None,
        "exit-on-error": "true",
        "strict-readiness": "true",
        "exit-timeout-secs": limits.longest_job_s + EXIT_MARGIN_S,
        "http-address": options.address,
        "http-port": options.http_port,
        "http-restricted-api": admin,
        "http-max-input-size": 2 * limits.max_image_bytes,
        "grpc-address": options.address,
        "grpc-port": options.grpc_port,
        "grpc-restricted-protocol": admin,
        "grpc-keepalive-time": KEEPALIVE_MS,  # finds clients that vanished, whose jobs are then cancelled
        "metrics-address": options.address,
        "metrics-port": options.metrics_port,
        "allow-sagemaker": "false",
        "allow-vertex-ai": "false",
        "allow-client-shm": "false",
        **(dict.fromkeys(("log-info", "log-warning"), "false") if options.quiet else {}),
    }
    flags = [_flag(name, value) for name, value in asked.items() if value != "" and (known is None or name in known)]
    backend = {"shm-region-prefix-name": options.region_prefix, "stub-timeout-seconds": LOAD_S}
    return [*flags, *(f"--backend-config=python,{k}={v}" for k, v in backend.items())]


def _flag(name: str, value: object) -> str:
    return f"--{name}" if value is None else f"--{name}={value}"


def _known_options(installation: Installation) -> set[str]:
    try:
        done = subprocess.run([installation.binary, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        found = f"{installation.binary}: {error.strerror}"
        raise UserError(found, "a tritonserver for this machine", "name another with --server") from None
    words = (line.split() for line in (done.stdout + done.stderr).splitlines())
    return {parts[0].removeprefix("--") for parts in words if parts and parts[0].startswith("--")}


@contextmanager
def running(
    installation: Installation,
    repository: Path,
    limits: Limits,
    options: ServeOptions,
    environment: Mapping[str, str],
) -> Iterator[subprocess.Popen[bytes]]:
    """A started server; at the end of the block it is told to stop, waited for, and its shared memory is removed.

    Its output goes to this process's. It runs in a session of its own, so that Ctrl-C reaches it as one SIGTERM.

    Raises:
        UserError: a port is taken, no address, or a server that is no program.
    """
    for port in (options.http_port, options.grpc_port, options.metrics_port):
        _check_free(options.address, port)
    key = secrets.token_hex(16)  # told to nobody, so the APIs behind it are closed
    with backend_folder(installation) as backends:
        asked = arguments(repository, limits, options, key, _known_options(installation))
        command = [str(installation.binary), *asked, *_backend_argument(backends)]
        process = subprocess.Popen(command, env=stub_environment(installation, environment), start_new_session=True)
        try:
            yield process
        finally:
            stop(process, limits.longest_job_s + 2 * EXIT_MARGIN_S)
            remove_regions(options.region_prefix)


def _backend_argument(backends: Path | None) -> list[str]:
    return [f"--backend-directory={backends}"] if backends else []


def stop(process: "subprocess.Popen[bytes]", within_s: float) -> None:
    """SIGTERM, which lets the running job finish; SIGKILL after ``within_s`` or at Ctrl-C."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(within_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", options: ServeOptions, within_s: float = LOAD_S) -> None:
    """Returns when the server answers that every model is ready.

    Raises:
        UserError: it ended before, or did not get ready in time.
    """
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise UserError(
                f"tritonserver ended with {process.returncode} before it was ready", "models that load", "see its log"
            )
        if is_ready(f"http://{options.address}:{options.http_port}"):
            return
        time.sleep(0.1)
    raise UserError(f"tritonserver not ready after {within_s:g} s", "models that load", "see its log")


def watch(process: "subprocess.Popen[bytes]", options: ServeOptions, max_silence_s: float = probe.MAX_SILENCE_S) -> int:
    """Returns the exit status when the server ends; kills one whose model has died.

    Such a server answers that it is healthy, fails every job, and would take its whole exit timeout to stop.

    Raises:
        UserError: a model died or hangs.
    """
    while process.poll() is None:
        time.sleep(WATCH_EVERY_S)
        try:
            found = list(
                probe.troubles(probe.read(f"http://{options.address}:{options.metrics_port}/metrics"), max_silence_s)
            )
        except OSError:  # it is stopping, or too busy to answer; the process tells
            continue
        if found:
            process.kill()
            raise UserError(f"{found[0]}; the server was stopped", "models that live", "start it again")
    return process.returncode


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in probes:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in probes]


def _check_free(address: str, port: int) -> None:
    if not address:  # the server would take it for every address that the machine has
        raise UserError("an empty address", "one to listen on", "127.0.0.1 is for this machine alone")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(f"{address}:{port}: {error.strerror}", "a free port", "choose another") from None
