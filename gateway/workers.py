"""All workers of a gateway: their heartbeats, what is left of dead ones, and the end."""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

from gateway.api_error import ApiError
from gateway.served import ServedModel, TritonServer
from gateway.sweep import Sweep
from gateway.worker import Run, Surroundings, Worker

log = logging.getLogger("gateway")
BEAT_S = 1.0
SWEEP_S = 5.0
STOPPED_S = 10.0  # for workers to put down what they hold
FIND_S = 5.0  # between looks at the addresses behind names
BEHIND = "dns:"  # before a name whose addresses are a server each, as those of a headless Service of Kubernetes


class Workers:
    """Start and end with the gateway.

    Args:
        urls: gRPC addresses of Triton servers; ``dns:HOST:PORT`` are all addresses of HOST, looked up again and again.
        name: of the served model.
        around: what workers share.
        sweep: cleans up every few seconds.
        gateway: the name of this process; the names of workers begin with it.
    """

    def __init__(self, urls: Sequence[str], name: str, around: Surroundings, sweep: Sweep, gateway: str) -> None:
        self._claims, self._sweep, self._changed = around.claims, sweep, around.changed
        self._name, self._gateway, self._around = name, gateway, around
        fixed = [url for url in urls if not url.startswith(BEHIND)]
        self.all = [self._new(at, url) for at, url in enumerate(fixed)]
        self._behind = [url.removeprefix(BEHIND) for url in urls if url.startswith(BEHIND)]
        self._found: dict[str, Worker] = {}  # by address behind a name
        self._started, self._draining = len(fixed), False
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(BEAT_S, self._beat), name="heartbeat", daemon=True),
            threading.Thread(target=self._repeat, args=(SWEEP_S, self._clean), name="sweep", daemon=True),
            threading.Thread(target=self._repeat, args=(FIND_S, self._find), name="addresses", daemon=True),
        ]

    def start(self) -> None:
        for worker in self.all:
            worker.start()
        self._find()
        for thread in self._threads:
            thread.start()

    def _new(self, number: int, url: str) -> Worker:
        return Worker(f"{self._gateway}.{number}", TritonServer(url, self._name), self._around)

    def wake(self) -> None:
        for worker in self.all:
            worker.wake()

    def models(self) -> dict[str, ServedModel]:
        """The models of servers that are ready now."""
        return {worker.model.id: worker.model for worker in self.all if worker.model is not None}

    def end(self, job_id: str) -> None:
        """Stop the job, if it runs here; another gateway notices with its next heartbeat."""
        for run in self._runs():
            if run.id == job_id:
                run.end()

    def drain(self) -> None:
        """Take no more jobs."""
        self._draining = True
        for worker in self.all:
            worker.stop()

    def stop(self, within_s: float) -> None:
        """Take no more jobs, wait for those that run, and give the rest back to the queue."""
        self.drain()
        give_up = time.monotonic() + within_s
        while self._runs() and time.monotonic() < give_up:
            time.sleep(0.05)
        for run in self._runs():
            run.stop()
        give_up = time.monotonic() + STOPPED_S
        for worker in self.all:
            worker.join(max(0.0, give_up - time.monotonic()))
        self._over.set()

    def _runs(self) -> list[Run]:
        return [run for worker in self.all if (run := worker.run_now) is not None]

    def _beat(self) -> None:
        """Renew leases; end the runs of jobs that others have ended or taken."""
        runs = {run.id: run for run in self._runs()}
        if not runs:
            return
        going, ended = self._claims.beat([run.worker for run in runs.values()])
        for job_id, run in runs.items():
            if job_id in ended or (job_id not in going and run.job is not None and run in self._runs()):
                run.end()

    def _clean(self) -> None:
        self._sweep.run([run.id for run in self._runs()])

    def _find(self) -> None:
        """Give every new address behind the names a worker; one whose address is gone takes no more jobs, then ends."""
        try:
            there = {address for name in self._behind for address in addresses(name)}
        except OSError as error:  # nothing is behind the name, or nobody answers: servers that are gone are not ready
            log.warning("no address of %s: %s", ", ".join(self._behind), error)
            return
        for address, worker in list(self._found.items()):
            if address not in there:
                worker.stop()
            if not worker.is_alive():
                del self._found[address]
                self.all = [each for each in self.all if each is not worker]
        if self._draining:
            return
        for address in sorted(there - self._found.keys()):
            worker = self._found[address] = self._new(self._started, address)
            self._started += 1
            worker.start()
            self.all = [*self.all, worker]

    def _repeat(self, every_s: float, call: Callable[[], None]) -> None:
        while not self._over.wait(every_s):
            try:
                call()
            except ApiError as error:
                log.warning("%s", error.message)
            except Exception:
                log.exception("in the background")


def addresses(name: str) -> set[str]:
    """The addresses of HOST:PORT, each with the port. Raises OSError if there are none."""
    host, _, port = name.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return {f"[{at[0]}]:{port}" if family == socket.AF_INET6 else f"{at[0]}:{port}" for family, _, _, _, at in found}


def gateway_name() -> str:
    return secrets.token_hex(6)
