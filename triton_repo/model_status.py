"""What the process of a model says about itself, in a file that whoever started its server reads.

Triton itself answers that all is well long after a model's process has died, and stops answering when it is asked to
end. Every model therefore keeps one small JSON file in the folder that the environment variable ``WAN22_STATUS`` names:
which process it is, the job it runs, why it did not load. Standard library only.
"""

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = "WAN22_STATUS"  # environment variable
PARENT_EVERY_S = 0.5


@dataclass(frozen=True)
class ModelStatus:
    """The content of one file."""

    process: int
    process_began: int  # in clock ticks since boot: tells the process from a later one of the same number
    job: str = ""  # the one that runs
    failure: tuple[str, ...] = ()  # why the model did not load: found, expected, remedy

    @property
    def is_alive(self) -> bool:
        return process_began(self.process) == self.process_began


def process_began(process: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that has ended, reaped or not."""
    fields = _fields(process)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _fields(process: int) -> list[str]:
    """Of the kernel's line about a process, from its state on; none for one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class StatusFile:
    """The file of this process, as model ``name``; without the environment variable nothing is written."""

    def __init__(self, name: str) -> None:
        folder = os.environ.get(FOLDER)
        self._path = Path(folder, f"{name}.json") if folder else None
        self._status = ModelStatus(os.getpid(), process_began(os.getpid()) or 0)
        self._write()

    def began(self, job: str) -> None:
        self._write(job=job)

    def ended(self) -> None:
        self._write(job="")

    def failed(self, found: str, expected: str, remedy: str) -> None:
        self._write(failure=(found, expected, remedy))

    def _write(self, **changes: object) -> None:
        """Replaces the file as a whole; a folder that is gone means that nobody reads any more."""
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
        """What each model said last, by name."""
        return {path.stem: ModelStatus(**json.loads(path.read_text())) for path in sorted(self.folder.glob("*.json"))}

    def dead(self) -> list[str]:
        """Names of models whose process has ended."""
        return [name for name, status in self.read().items() if not status.is_alive]

    def jobs(self) -> list[str]:
        """Jobs that run, or ran when their model died."""
        return [status.job for status in self.read().values() if status.job]

    def failures(self) -> list[tuple[str, ...]]:
        """Found, expected and remedy of each model that did not load."""
        return [tuple(status.failure) for status in self.read().values() if status.failure]


def end_with_server() -> None:
    """From now on this process ends when the server that started it does; to be called before it holds much memory.

    Triton's stub notices that only between two requests: during a job it would stay for ever, with its GPU memory. A
    thread would not do, because a call to a server that is gone never returns and keeps the lock of the interpreter.
    A server that was started with a folder leads the group of this process, and may be dead already.
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
