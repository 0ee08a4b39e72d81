"""The status of a model's process, in a file for the program that started its server.

Triton reports that all is well long after a model's process has died, and stops answering while it shuts down. So every
model keeps a small JSON file in the folder of the environment variable ``WAN22_STATUS``: its process, its running job,
and the reason if it did not load. Standard library only.
"""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = "WAN22_STATUS"  # environment variable
PARENT_EVERY_S = 0.5


@dataclass(frozen=True)
class ModelStatus:
    """The content of one file."""

    process: int
    process_began: int  # in clock ticks since boot; differs for a later process of the same number
    job: str = ""  # the running one; with an expert on each device, two with a comma
    failure: tuple[str, ...] = ()  # found, expected and remedy if the model did not load

    @property
    def is_alive(self) -> bool:
        return process_began(self.process) == self.process_began


def process_began(process: int) -> int | None:
    """The start of a process, in clock ticks since boot; None if it has ended, reaped or not."""
    fields = _fields(process)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _fields(process: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class StatusFile:
    """The file of this process, as model ``name``; not written without the environment variable."""

    def __init__(self, name: str) -> None:
        folder = os.environ.get(FOLDER)
        self._path = Path(folder, f"{name}.json") if folder else None
        self._status = ModelStatus(os.getpid(), process_began(os.getpid()) or 0)
        self._jobs, self._one_at_a_time = list[str](), threading.Lock()
        self._write()

    def began(self, job: str) -> None:
        with self._one_at_a_time:
            self._jobs.append(job)
            self._write(job=", ".join(self._jobs))

    def ended(self, job: str) -> None:
        with self._one_at_a_time:
            self._jobs.remove(job)
            self._write(job=", ".join(self._jobs))

    def failed(self, found: str, expected: str, remedy: str) -> None:
        self._write(failure=(found, expected, remedy))

    def _write(self, **changes: object) -> None:
        """Replace the file atomically; if its folder is gone, nobody reads it any more."""
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]
        if self._path is None or not self._path.parent.is_dir():
            return
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self._status)))
        temporary.replace(self._path)


@dataclass(frozen=True)
class Models:
    """The models of one server, read from the files in ``folder``."""

    folder: Path

    def read(self) -> dict[str, ModelStatus]:
        """The last status of each model, by name."""
        return {path.stem: ModelStatus(**json.loads(path.read_text())) for path in sorted(self.folder.glob("*.json"))}

    def dead(self) -> list[str]:
        """The names of models whose process has ended."""
        return [name for name, status in self.read().items() if not status.is_alive]

    def jobs(self) -> list[str]:
        """The running jobs, including those of models that died."""
        return [status.job for status in self.read().values() if status.job]

    def failures(self) -> list[tuple[str, ...]]:
        """The found, expected and remedy of each model that did not load."""
        return [tuple(status.failure) for status in self.read().values() if status.failure]


def end_with_server() -> None:
    """End this process when the server that started it ends. Call this before allocating much memory, since it forks.

    Triton's stub checks its server only between requests: during a job it would stay for ever, with its GPU memory. A
    thread is not enough, because a call to a dead server never returns and holds the interpreter's lock. A server
    started with a status folder leads this process's group, and may already be dead.
    """
    model, server = os.getpid(), os.getpgrp() if FOLDER in os.environ else os.getppid()
    if os.fork() == 0:
        try:
            while os.getppid() == model and _parent(model) == server:
                time.sleep(PARENT_EVERY_S)
            if os.getppid() == model:
                os.kill(model, signal.SIGKILL)
        finally:
            os._exit(0)


def _parent(process: int) -> int | None:
    fields = _fields(process)
    return int(fields[1]) if fields else None
