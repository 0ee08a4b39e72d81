"""What the process of a model says about itself, in a file that whoever started its server reads.

Triton itself answers that all is well long after a model's process has died, and stops answering when it is asked to
end. Every model therefore keeps one small JSON file in the folder that the environment variable ``WAN22_STATUS`` names:
which process it is, the job it runs, when it last handed a video over, why it did not load. Standard library only.
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
    """The content of one file. Times are of the monotonic clock, which all processes of a machine share."""

    process: int
    process_began: int  # in clock ticks since boot: tells the process from a later one of the same number
    job: str = ""  # the one that runs
    answered_s: float = -float("inf")  # when the last video was handed to the server
    failure: tuple[str, ...] = ()  # why the model did not load: found, expected, remedy

    @property
    def is_alive(self) -> bool:
        return process_began(self.process) == self.process_began


def process_began(process: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that has ended, reaped or not."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


class StatusFile:
    """The file of this process, as model ``name``; without the environment variable nothing is written."""

    def __init__(self, name: str) -> None:
        folder = os.environ.get(FOLDER)
        self._path = Path(folder, f"{name}.json") if folder else None
        self._status = ModelStatus(os.getpid(), process_began(os.getpid()) or 0)
        self._write()

    def began(self, job: str) -> None:
        self._write(job=job)

    def ended(self, *, with_video: bool) -> None:
        self._write(job="", answered_s=time.monotonic() if with_video else self._status.answered_s)

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

    def since_answer_s(self) -> float:
        """Seconds since any model handed a video over; infinite if none ever did."""
        return time.monotonic() - max((status.answered_s for status in self.read().values()), default=-float("inf"))

    def failures(self) -> list[tuple[str, ...]]:
        """Found, expected and remedy of each model that did not load."""
        return [tuple(status.failure) for status in self.read().values() if status.failure]


def end_with_server() -> None:
    """From now on this process ends when the server that started it does.

    Triton's stub notices that only between two requests: during a job it would stay for ever, with its GPU memory.
    """
    server = os.getppid()

    def run() -> None:
        while os.getppid() == server:
            time.sleep(PARENT_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)  # no handler, no lock and no engine call can delay it

    threading.Thread(target=run, name="end-with-server", daemon=True).start()
