"""Many videos from a file of jobs: a file and a line of results for each. A second run makes what is missing.

Workers render: processes on this machine, actors of a Ray cluster, or servers. This process alone writes, so a killed
run leaves whole videos and no half one, and a job that a lost worker had goes to another.
"""

import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from wan22.bundle import Manifest
from wan22.errors import UserError, deferred_interrupts
from wan22.progress import Progress, silent
from wan_trt.recipes.batch.folder import Folder
from wan_trt.recipes.batch.jobs import Job, Result, check_job, read_jobs, unnamed

TRIES = 2  # workers that a job may take with it
MOST_SHOWN = 3  # running jobs


class WorkerLostError(Exception):
    """The worker ended inside a job: its process, its node or its server."""


class Worker(Protocol):
    """One renderer, used by one thread."""

    name: str

    def render(self, job: Job) -> bytes:
        """The video. Raises WorkerLostError, or anything else for a job that cannot be made."""

    def stop(self) -> None:
        """End the job at once; called by another thread, and ``render`` then raises."""


@dataclass(frozen=True)
class Workers:
    """Who renders. ``open`` makes a worker for the time of a block, again after one was lost.

    ``open`` raises UserError if that worker cannot render at all, such as a node without the engines.
    """

    count: int
    engines: str  # see :attr:`Result.engines`
    open: Callable[[int], Any]  # index → context manager of a Worker
    manifest: Manifest | None = None  # to judge jobs before rendering; None where only servers know it
    gpus: int = 0  # of each worker


@dataclass
class Summary:
    """The counts of a run, and its time."""

    done: int = 0
    failed: int = 0
    earlier: int = 0  # done by an earlier run
    missing: int = 0  # not tried, because no worker was left or the run was interrupted
    seconds: float = 0.0
    worker_seconds: float = 0.0
    errors: list[Result] = field(default_factory=list)

    @property
    def videos_per_hour(self) -> float:
        return 3600 * self.done / self.seconds if self.seconds else 0.0


def run_batch(
    jobs_file: Path,
    output: str,
    workers: Workers,
    *,
    summary: Summary | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda _line: None,
    beat_s: float = math.inf,
) -> Summary:
    """Make every video of ``jobs_file`` that ``output`` lacks.

    Args:
        jobs_file: JSON lines, see :func:`read_jobs`.
        output: a folder, or a URL of fsspec.
        workers: who renders.
        summary: filled in as the run goes on, so that a caller has it after an interruption; by default a new one.
        progress: called with the jobs that are finished.
        tell: receives a line for every failed job and lost worker.
        beat_s: seconds without a finished job after which ``tell`` receives a line that says what runs.

    Raises:
        UserError: the file or the folder cannot be used, or no worker can render.
    """
    found = list(read_jobs(jobs_file))
    summary, began = summary or Summary(), time.monotonic()
    with Folder.opened(output, Result) as folder:
        todo: queue.SimpleQueue[tuple[Job, int]] = queue.SimpleQueue()
        waiting = 0
        for each in found:
            result = each if isinstance(each, Result) else _judged(each, workers)
            earlier = folder.results.get(each.name)
            if result is not None:
                _record(result, folder, summary, tell)
            elif earlier is not None and earlier.status == "done" and folder.has(earlier.file, earlier.sha256):
                assert isinstance(each, Job)
                _check_same(earlier, each, workers.engines, output)
                summary.earlier += 1
            else:
                assert isinstance(each, Job)
                todo.put((each, 1))
                waiting += 1
        finished = len(found) - waiting
        progress("batch", finished, len(found), "jobs")
        try:
            with _Rendering(workers, todo, waiting, tell) as rendering:
                for result, video in rendering.results(beat_s):
                    with deferred_interrupts():  # no video without its line
                        if video is not None:
                            folder.write(result.file, video)
                        _record(result, folder, summary, tell)
                    finished += 1
                    progress("batch", finished, len(found), "jobs")
        finally:
            summary.missing = len(found) - summary.done - summary.failed - summary.earlier
            summary.seconds = time.monotonic() - began
    return summary


def _judged(job: Job, workers: Workers) -> Result | None:
    """A failed result for a job that the engines cannot make; None for any other."""
    if workers.manifest is None:
        return None
    try:
        check_job(job, workers.manifest)
    except UserError as error:
        return Result(job.name, "failed", job.sha256, workers.engines, job.line, error=f"line {job.line}: {error}")
    return None


def _check_same(earlier: Result, job: Job, engines: str, output: str) -> None:
    for what, before, now in (("line", earlier.job, job.sha256), ("engines", earlier.engines, engines)):
        if before != now:
            found = f"{output} has {earlier.file} of another {what}"
            raise UserError(found, "the folder of this batch, or a new one", "choose another folder, or rename the job")


def _record(result: Result, folder: Folder[Result], summary: Summary, tell: Callable[[str], None]) -> None:
    folder.add(result)
    summary.worker_seconds += result.seconds
    if result.status == "done":
        summary.done += 1
    else:
        summary.failed += 1
        summary.errors.append(result)
        line = f"line {result.line}"
        who = line if result.name == unnamed(result.line) else f"{result.name} ({line})"
        tell(f"{who} failed: {result.error.removeprefix(f'{line}: ')}")


class _Rendering:
    """Threads, one a worker, that render what is in ``todo``; as a context manager it ends them."""

    def __init__(
        self, workers: Workers, todo: "queue.SimpleQueue[tuple[Job, int]]", left: int, tell: Callable[[str], None]
    ) -> None:
        self._workers, self._todo, self.left, self._tell = workers, todo, left, tell
        self._made: queue.Queue[tuple[Result, bytes | None] | BaseException | None] = queue.Queue(workers.count)
        self._stop, self._open = threading.Event(), dict[int, Worker]()
        self._running = dict[int, tuple[str, float]]()  # by worker: its job, since when

    def __enter__(self) -> "_Rendering":
        count = min(self._workers.count, self.left)
        self._threads = [threading.Thread(target=self._work, args=(index,), daemon=True) for index in range(count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in list(self._open.values()):
            worker.stop()
        while any(thread.is_alive() for thread in self._threads):
            try:
                self._made.get(timeout=0.1)
            except queue.Empty:
                continue

    def results(self, beat_s: float = math.inf) -> Iterator[tuple[Result, bytes | None]]:
        """Every finished job with its video, until none is left or no worker is. Raises the last worker's error."""
        alive, error = len(self._threads), None
        while self.left and alive:
            try:
                made = self._made.get(timeout=min(beat_s, threading.TIMEOUT_MAX))
            except queue.Empty:
                self._tell(self._beat())
                continue
            if made is None or isinstance(made, BaseException):
                alive -= 1
                error = made or error
                continue
            self.left -= 1
            yield made
        if self.left and error is not None:
            raise error

    def _beat(self) -> str:
        now, running = time.monotonic(), list(self._running.values())
        shown = ", ".join(f"{name} for {now - began:.0f} s" for name, began in running[:MOST_SHOWN])
        more = f" and {len(running) - MOST_SHOWN} more" if len(running) > MOST_SHOWN else ""
        return f"{self.left} jobs left; running: {shown or 'none'}{more}"

    def _work(self, index: int) -> None:
        """Open worker ``index``, again after it was lost, and render until there is nothing to do."""
        try:
            while not self._stop.is_set():
                with self._workers.open(index) as worker:
                    self._open[index] = worker
                    if self._rendered(worker, index):
                        break
            self._made.put(None)
        except UserError as error:
            self._tell(f"a worker less: {error}")
            self._made.put(error)
        except BaseException as error:  # a bug, which the main thread raises where no other worker is left
            self._tell(f"a worker less: {type(error).__name__}: {error}")
            self._made.put(error)

    def _rendered(self, worker: Worker, index: int) -> bool:
        """Render jobs until none waits; False if the worker was lost, whose job then waits again."""
        while not self._stop.is_set():
            try:
                job, tries = self._todo.get(timeout=0.2)
            except queue.Empty:
                if self.left:  # a lost worker's job may come back
                    continue
                return True
            began = time.monotonic()
            self._running[index] = job.name, began
            try:
                video = worker.render(job)
            except WorkerLostError as lost:
                if self._stop.is_set():
                    return True
                self._tell(f"{worker.name} was lost with {job.name}: {lost}")
                if tries < TRIES:
                    self._todo.put((job, tries + 1))
                else:
                    self._put(job, worker, began, error=f"{tries} workers were lost with it, the last: {lost}")
                return False
            except Exception as error:  # whatever a job does, the others run
                self._put(job, worker, began, error=f"line {job.line}: {error}")
            else:
                self._put(job, worker, began, video)
            finally:
                del self._running[index]
        return True

    def _put(self, job: Job, worker: Worker, began: float, video: bytes | None = None, error: str = "") -> None:
        seconds = round(time.monotonic() - began, 3)
        engines, seed = self._workers.engines, int(job.settings["seed"])
        result = Result(
            job.name,
            "failed",
            job.sha256,
            engines,
            job.line,
            seed=seed,
            seconds=seconds,
            worker=worker.name,
            error=error,
        )
        if video is not None:
            digest = hashlib.sha256(video).hexdigest()
            result = msgspec.structs.replace(result, status="done", file=job.file, sha256=digest)
        self._made.put((result, video))
