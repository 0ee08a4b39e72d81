"""A worker: the thread that gives one Triton server one job at a time, and stores what comes of it."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.api_error import ApiError
from gateway.claims import Claim, Claims
from gateway.outcome import Outcome, outcome_of
from gateway.progress import Progress
from gateway.served import ServedModel, TritonServer, UnreachableError
from gateway.store import Store, StoreError
from triton_repo.client import Event, Job, Result, WanClient
from triton_repo.client_errors import JobError
from wan22.errors import UserError

log = logging.getLogger("gateway")
T = TypeVar("T")
IDLE_S = 0.5  # between looks at the queue of other gateways; this one's own jobs wake it
SEEN_EVERY_S = 5.0
REPORT_EVERY_S = 0.25  # at most, within a phase
BACK_OFF_S = (0.5, 30.0)  # after a server that refused a job: first and longest
INSIST_S = 600.0  # on a database that does not answer, with a finished video
STORE_WITHIN_S = 60.0


@dataclass
class Run:
    """A job that runs. Any thread may end it."""

    claim: Claim
    worker: str
    job: Job | None = None
    ended: threading.Event = field(default_factory=threading.Event)  # by its client, or the lease is lost

    @property
    def id(self) -> str:
        return str(self.claim.job["id"])

    def end(self) -> None:
        self.ended.set()
        self.stop()

    def stop(self) -> None:
        if self.job is not None:
            self.job.cancel()


@dataclass(frozen=True)
class Surroundings:
    """What workers share."""

    claims: Claims
    store: Store
    changed: Callable[[str], None]  # called with the id of a job that has got on
    keep_s: float | None  # how long videos are kept
    ended: Callable[[str, str, float], None]  # called with model, outcome, seconds
    phase: Callable[[str, str, float], None]  # called with model, phase, seconds
    latents: Mapping[str, bytes] = field(default_factory=dict)  # initial latents of the operator, by name


class Worker(threading.Thread):
    def __init__(self, name: str, server: TritonServer, around: Surroundings) -> None:
        super().__init__(name=name, daemon=True)
        self.server, self._around, self._claims = server, around, around.claims
        self.model: ServedModel | None = None  # None while the server is not ready
        self.run_now: Run | None = None
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._seen_at, self._refusals = 0.0, 0
        self._is_missing = False  # and the log says so

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        """Take no more jobs; one that runs goes on."""
        self._stopping.set()
        self.wake()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                claim = self._next()
                if claim is not None:
                    self._work(claim)
                    continue
            except ApiError as error:  # the database; what was claimed is recovered when it answers again
                log.warning("%s: %s", self.name, error.message)
            except Exception:
                log.exception("%s", self.name)
            self._wake.wait(self._pause())
            self._wake.clear()
        self.server.close()

    def _pause(self) -> float:
        first, longest = BACK_OFF_S
        return min(longest, first * 2**self._refusals) if self._refusals else IDLE_S

    def _next(self) -> Claim | None:
        """The next job, if the server is ready and one is due."""
        self._look()
        if self.model is None or not self._claims.has_waiting(self.model.id):
            return None
        return self._claims.claim(self.name, self.server.url, self.model.id)

    def _look(self) -> None:
        """Ask the server whether it takes jobs, and for its model after every start of it."""
        if not self.server.is_ready():
            if not self._is_missing:
                log.warning("server %s takes no jobs: not there, or not ready", self.server.url)
            self.model, self._is_missing = None, True
            return
        self._is_missing = False
        if self.model is None or time.monotonic() - self._seen_at > SEEN_EVERY_S:
            try:
                self.model = self.server.model()
            except (UnreachableError, UserError) as error:
                log.warning("%s", error)
                self.model = None
                return
            self._claims.saw(self.server.url, self.model)
            self._seen_at = time.monotonic()

    def _work(self, claim: Claim) -> None:
        run = Run(claim, self.name)
        self.run_now = run
        try:
            with WanClient(self.server.url, self.server.name) as client:
                outcome = self._outcome(run, client)
            if run.ended.is_set():
                self._insist(lambda: self._claims.let_go(run.id, self.name))
            elif outcome is not None:
                self._end(run, outcome)
        except ApiError:
            raise
        except Exception:  # a bug, or a failing machine
            log.exception("job %s", run.id)
            self._end(run, Outcome("", "the gateway failed", lost=True))
        finally:
            self.run_now = None
            self._around.changed(run.id)
            self._insist(lambda: self._claims.free_server(self.server.url, self.name))

    def _outcome(self, run: Run, client: WanClient) -> Outcome | None:
        """Run the job to its end; None if its video is stored, or nobody wants it any more."""
        job, started = run.claim.job, False
        inputs = dict(run.claim.inputs)
        if job["timeout_s"] is not None:
            inputs["deadline_ms"] = max(1, int(job["timeout_s"] * 1000))
        latent = json.loads(job["echo"]).get("latent")
        if latent is not None and latent not in self._around.latents:
            return Outcome("invalid_request", f"latent {latent!r} is not offered by this gateway any more")
        if latent is not None:
            inputs["noise"] = self._around.latents[latent]
        progress = Reporter(run, self._around, Progress(job["progress"], "image" in inputs))
        try:
            run.job = client.submit(inputs, priority=1 if job["priority"] == 1 else 2)
            if run.ended.is_set():  # before there was anything to cancel
                run.job.cancel()
            for event in run.job.events():
                started = True
                if event["phase"] != "done":
                    progress.report(event)
                if run.ended.is_set():
                    return None
            self._refusals = 0
            return self._keep(run, run.job.result())
        except JobError as error:
            self._refusals = 0 if started else self._refusals + 1
            return outcome_of(error, started=started)

    def _keep(self, run: Run, result: Result) -> Outcome | None:
        """Store the video: record, file, record, so that a kill between any two leaves nothing unexplained."""
        job, event = run.claim.job, {k: v for k, v in result.event.items() if k != "preview"}
        suffix = job["media_type"].partition("/")[2]
        name = f"{job['id']}.{job['starts']}.{suffix}"
        digest = hashlib.sha256(result.video).hexdigest()
        record = {"file": name, "size_bytes": len(result.video), "sha256": digest, "event": event}
        if not self._insist(lambda: self._claims.intend(run.id, self.name, record)):
            run.ended.set()
            return None
        try:
            self._store(name, result.video)
        except StoreError as error:
            return Outcome(error.code, str(error))
        if not self._insist(lambda: self._claims.complete(run.id, self.name, self._around.keep_s)):
            self._around.store.remove(name)
            run.ended.set()
            return None
        self._insist(lambda: self._claims.learn(job["model"], job["work"], event["seconds"]))
        self._around.ended(job["model"], "completed", event["seconds"])
        return None

    def _store(self, name: str, content: bytes) -> None:
        give_up = time.monotonic() + STORE_WITHIN_S
        while True:
            try:
                return self._around.store.put(name, content)
            except StoreError as error:
                log.warning("%s: %s: %s", name, error, error.__cause__)
                if time.monotonic() > give_up:
                    raise
                time.sleep(2.0)

    def _end(self, run: Run, outcome: Outcome) -> None:
        if outcome.code:
            log.info("job %s: %s", run.id, outcome.code)
            self._insist(lambda: self._claims.fail(run.id, self.name, outcome.code, outcome.message))
            self._around.ended(run.claim.job["model"], outcome.code, 0.0)
            return
        log.info("job %s goes back to the queue: %s", run.id, outcome.message)
        started = outcome.lost or self._refusals == 0
        self._insist(
            lambda: self._claims.give_back(
                run.id, self.name, started=started, lost=outcome.lost, message=outcome.message
            )
        )

    def _insist(self, call: Callable[[], T]) -> T:
        """Call until the database answers."""
        give_up = time.monotonic() + INSIST_S
        while True:
            try:
                return call()
            except ApiError as error:
                if error.status != 503 or time.monotonic() > give_up:
                    raise
                time.sleep(1.0)


class Reporter:
    """Stores the events of a run, at most so many a second.

    A new phase and a new expert are always stored, and so are the first of some steps that a step cache estimates and
    the first that is computed again.
    """

    def __init__(self, run: Run, around: Surroundings, progress: Progress) -> None:
        self._run, self._around, self._progress = run, around, progress
        self._phase, self._phase_at, self._at = "", 0.0, 0.0
        self._expert: str | None = None
        self._cached = False

    def report(self, event: Event) -> None:
        values: dict[str, Any] = self._progress.values(event)
        now, wall = time.monotonic(), time.time()
        begins, changes = not self._phase, values["phase"] != self._phase
        expert = values.get("expert", self._expert)
        cached = bool(event.get("cached", False))
        steady = (changes, expert, cached) == (False, self._expert, self._cached)
        if steady and now - self._at < REPORT_EVERY_S:
            return
        if changes:
            values["phase_at"] = wall
        if begins:
            values |= {"status": "in_progress", "started_at": wall}
        kind, preview = "status" if begins else "progress", event.get("preview", b"")
        try:
            kept = self._around.claims.report(self._run.id, self._run.worker, kind, values, preview, cached=cached)
        except ApiError:  # the database is away; the job goes on
            return
        if changes:
            if not begins:
                self._around.phase(self._run.claim.job["model"], self._phase, now - self._phase_at)
            self._phase, self._phase_at = values["phase"], now
        self._expert, self._cached, self._at = expert, cached, now
        if not kept:
            self._run.end()
        self._around.changed(self._run.id)
