"""One stage of a run on a GPU, in a separate process; every outcome becomes a result.

A stage is a generator of measurements, so a stage that dies or runs out of time keeps those it has yielded. Missing
packages, kernels that reject a dtype and driver crashes are recorded with their reasons.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from math import isfinite
from multiprocessing.connection import Connection
from typing import Any, Self

from validate.bench.child_process import child_process
from wan22.errors import UserError

LONGEST_REASON = 300  # characters
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StageSettings:
    dry_run: bool  # tiny sizes on the CPU: checks that the stage runs, measures nothing
    seed: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


@dataclass(frozen=True)
class Measurement:
    """``unit`` is the unit of ``value``. A result without a finite value has only a ``note``."""

    what: str
    value: float | None = None
    unit: str = ""
    note: str = ""

    @classmethod
    def of(cls, what: str, value: float, unit: str = "", note: str = "") -> Self:
        """A measurement of a value that may be NaN or infinite, which JSON cannot express."""
        return cls(what, value, unit, note) if isfinite(value) else cls(what, note=f"not finite: {value}, {note}")


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    module: str
    function: str  # takes the setting and ``arguments``; yields measurements
    arguments: tuple[Any, ...] = ()

    def measurements(self, setting: StageSettings) -> Iterator[Measurement]:
        work: Callable[..., Iterator[Measurement]] = getattr(import_module(self.module), self.function)
        return work(setting, *self.arguments)


@dataclass
class StageResult:
    """The result of a stage. ``status``: measured, failed, time ran out, interrupted or skipped."""

    stage: Stage
    status: str = "interrupted"
    reason: str = ""
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.stage.name,
            "title": self.stage.title,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "measurements": [asdict(row) for row in self.measurements],
        }


def run_stage(answer: StageResult, setting: StageSettings, limit_s: float) -> None:
    """Run a stage and fill in ``answer``, which keeps its measurements however the stage ends, even by Ctrl-C."""
    started = time.monotonic()
    try:
        with child_process(_work, answer.stage, setting) as (receiver, process):
            _listen(answer, receiver, started + limit_s)
    finally:
        answer.seconds = time.monotonic() - started
    if answer.status == "failed" and not answer.reason:
        answer.reason = f"its process ended with code {process.exitcode}"


def _listen(answer: StageResult, receiver: Connection, deadline: float) -> None:
    while True:
        if time.monotonic() > deadline:
            answer.status = "time ran out"
            return
        if not receiver.poll(POLL_SECONDS):
            continue
        try:
            message = receiver.recv()
        except EOFError:  # the process died
            answer.status = "failed"
            return
        if isinstance(message, Measurement):
            answer.measurements.append(message)
        else:
            answer.status, answer.reason = message
            return


def _work(sender: Connection, stage: Stage, setting: StageSettings) -> None:
    try:
        for measurement in stage.measurements(setting):
            sender.send(measurement)
        sender.send(("measured", ""))
    except Exception as error:
        sender.send(("failed", reason_of(error)))


def reason_of(error: Exception) -> str:
    """The exception on one line."""
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (name + " ".join(str(error).split()))[:LONGEST_REASON]
