"""All workers of a gateway: their heartbeats, what is left of dead ones, and the end."""

import logging
import secrets
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


class Workers:
    """Start and end with the gateway.

    Args:
        urls: gRPC addresses of Triton servers.
        name: of the served model.
        around: what workers share.
        sweep: cleans up every few seconds.
        gateway: the name of this process; the names of workers begin with it.
    """

    def __init__(self, urls: Sequence[str], name: str, around: Surroundings, sweep: Sweep, gateway: str) -> None:
        self._claims, self._sweep, self._changed = around.claims, sweep, around.changed
        self.all = [Worker(f"{gateway}.{at}", TritonServer(url, name), around) for at, url in enumerate(urls)]
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(BEAT_S, self._beat), name="heartbeat", daemon=True),
            threading.Thread(target=self._repeat, args=(SWEEP_S, self._clean), name="sweep", daemon=True),
        ]

    def start(self) -> None:
        for thread in (*self._threads, *self.all):
            thread.start()

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

    def _repeat(self, every_s: float, call: Callable[[], None]) -> None:
        while not self._over.wait(every_s):
            try:
                call()
            except ApiError as error:
                log.warning("%s", error.message)
            except Exception:
                log.exception("in the background")


def gateway_name() -> str:
    return secrets.token_hex(6)
