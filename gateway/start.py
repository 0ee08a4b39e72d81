"""Put a gateway together and run it until it is told to end."""

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from gateway.app import make_app
from gateway.claims import Claims
from gateway.database import Database, sqlite_url
from gateway.gateway import Gateway, Options
from gateway.hub import Hub
from gateway.jobs import Jobs
from gateway.keys import Keys
from gateway.metrics import GatewayMetrics, State, Values
from gateway.outer import BACKLOG, Protocol
from gateway.store import open_store
from gateway.sweep import Keep, Sweep
from gateway.worker import Surroundings
from gateway.workers import Workers, gateway_name
from wan22.errors import UserError

LEASE_S = 15.0


@dataclass(frozen=True)
class GatewayOptions:
    """Where a gateway listens, what it keeps where, and how much it takes."""

    data: Path  # folder: SQLite and videos, unless they are elsewhere
    servers: tuple[str, ...]  # gRPC addresses
    name: str = "wan22"  # of the model on the servers
    address: str = "127.0.0.1"
    port: int = 8080
    database: str = ""  # postgresql://...; empty for SQLite in the folder
    videos: str = ""  # s3://...; empty for the folder
    most_waiting: int = 100
    most_waiting_of_key: int | None = None
    most_running_of_key: int | None = None
    keep: Keep = field(default_factory=Keep)
    require_keys: bool = False  # even while there are none
    finish_within_s: float = 30.0  # for running jobs at the end
    lease_s: float = LEASE_S
    http: Options = field(default_factory=Options)


def database_url(data: Path, database: str) -> str:
    """The database of a gateway; its folder is made. Raises UserError for a folder that cannot be used."""
    if not database:
        _make_folder(data)
    return database or sqlite_url(data)


def run_gateway(options: GatewayOptions, ready: Callable[[], None], trouble: Callable[[], str] = str) -> str:
    """Serve until SIGTERM or Ctrl-C; running jobs get some time, the others stay in the queue for the next start.

    Args:
        options: see :class:`GatewayOptions`.
        ready: called when requests are taken.
        trouble: asked now and then; a reason to end, or "".

    Returns:
        The reason, if one ended it.

    Raises:
        UserError: the address, the database or the store cannot be used, or another gateway uses the folder.
    """
    listening = _listen(options.address, options.port)
    with listening, only_one(options.data, shared=bool(options.database)):
        gateway, workers = _assembled(options)
        workers.start()
        server = _Server(uvicorn.Config(
            make_app(gateway), http=Protocol, log_config=None, access_log=False, server_header=False,
            backlog=BACKLOG, timeout_keep_alive=75, timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=64 * 1024,
        ), gateway)  # fmt: skip
        threading.Thread(target=server.watch, args=(ready, trouble, options), daemon=True).start()
        server.run([listening])
        workers.stop(0.0)
        return server.reason


def _assembled(options: GatewayOptions) -> tuple[Gateway, Workers]:
    database = Database(database_url(options.data, options.database))
    store, keys, hub, name = (
        open_store(options.videos or str(options.data / "videos")),
        Keys(database, required=options.require_keys),
        Hub(),
        gateway_name(),
    )
    if options.address not in ("127.0.0.1", "::1", "localhost") and not (options.require_keys or keys.any()):
        remedy = "make one with wan-trt gateway key add, add --require-keys, or leave --address out"
        raise UserError(f"address {options.address} without keys", "a key for clients of other machines", remedy)
    jobs = Jobs(database, options.most_waiting, options.most_waiting_of_key)
    claims = Claims(database, options.lease_s, options.most_running_of_key)
    metrics = GatewayMetrics(lambda: _state(jobs, claims))
    latents = options.http.latents.values
    around = Surroundings(claims, store, hub.changed, options.keep.seconds, metrics.ended, metrics.phase, latents)
    sweep = Sweep(database, claims, store, options.keep)
    if not database.is_postgres:
        sweep.start()
    workers = Workers(options.servers, options.name, around, sweep, name)
    return Gateway(jobs, claims, store, keys, workers, hub, metrics, options.http), workers


def _state(jobs: Jobs, claims: Claims) -> State:
    counts: Values = {label: float(count) for label, count in jobs.counts().items()}
    ready: Values = {(model,): float(count) for model, count in claims.ready_servers().items()}
    stored: Values = {(): float(jobs.stored_bytes())}
    return {
        "wan_gateway_jobs": (("model", "status"), "Jobs by status.", counts),
        "wan_gateway_servers_ready": (("model",), "Servers that take jobs.", ready),
        "wan_gateway_stored_bytes": ((), "Bytes of finished videos.", stored),
    }


class _Server(uvicorn.Server):
    """At the first signal it takes no more jobs, finishes those that run, and then ends; at the second at once."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self.reason, self._gateway = "", gateway
        self._told = threading.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told.is_set():
            super().handle_exit(sig, frame)
        self._told.set()

    def watch(self, ready: Callable[[], None], trouble: Callable[[], str], options: GatewayOptions) -> None:
        while not self.started:
            if self._told.wait(0.05):
                self.should_exit = True
                return
        ready()
        while not self._told.wait(1.0):
            if reason := trouble():
                self.reason = reason
                break
        self._gateway.draining = True
        self._gateway.workers.stop(0.0 if self.reason else options.finish_within_s)
        self.should_exit = True


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio turns Nagle's algorithm off, which delays answers by 40 ms, where the protocol is named
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if not address:
            raise UserError("an empty address", "an address to listen on", "use 127.0.0.1 for this machine alone")
        made.bind((address, port))
    except OSError as error:
        made.close()
        raise UserError(f"{address}:{port}: {error.strerror}", "a free port", "choose another --port") from None
    return made


def _make_folder(data: Path) -> None:
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{data}: {error.strerror}", "a folder that can be made", "choose another --data") from None


@contextmanager
def only_one(data: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder: gateways that share work do so by PostgreSQL."""
    _make_folder(data)
    if shared:
        yield
        return
    descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "choose another --data, or share a --database"
        raise UserError(f"{data} is used by a running gateway", "a folder of its own", remedy) from None
    try:
        yield
    finally:
        os.close(descriptor)
