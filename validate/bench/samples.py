"""Timings of the same work on several sides that take turns, and statistics on them.

Sides alternate, A B A B, so that a busy or throttled machine slows both. It does not slow them equally: PyTorch's
threads spin while they wait for each other and lose most when other processes use their cores. The speed-up is the
median of the ratios of neighbouring runs, and its spread is that of the ratios. Before each run, the previous side's
threads get time to stop spinning. Processor time is recorded as well as wall time: on a busy machine it shows how much
work was done. It includes spinning, which PyTorch's threads do unless ``OMP_WAIT_POLICY=passive``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
SETTLING_SECONDS = 0.02  # the thread pools of both sides spin for a few milliseconds after work


@dataclass(frozen=True)
class Samples:
    """Repeated runs: wall time, processor time of all threads and, if known, energy of the GPU."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()
    joules: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def energy_j(self) -> float | None:
        """The mean per run, since the counter is too coarse for a median."""
        return float(np.mean(self.joules)) if self.joules else None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"median_ms": 1000 * self.median, "p90_ms": 1000 * self.p90}
        if self.cpu_seconds:
            found["cpu_median_ms"] = 1000 * float(np.median(self.cpu_seconds))
        if self.energy_j is not None:
            found["energy_j"] = self.energy_j
        return found | {"samples_ms": [round(1000 * value, 4) for value in self.seconds]}


@dataclass(frozen=True)
class Ratio:
    """The ratio of two sides' times, from runs that took turns."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> "Ratio":
        """The ratios of neighbouring runs; both sequences are in the order of the runs."""
        ratios = np.asarray(numerator) / np.asarray(denominator)
        p10, median, p90 = np.percentile(ratios, [10, 50, 90])
        return cls(float(median), float(p10), float(p90))


def measure_time(work: Callable[[], T]) -> tuple[T, float]:
    """Call ``work``; return its result and the seconds it took."""
    started = perf_counter()
    result = work()
    return result, perf_counter() - started


def settle() -> None:
    """Wait until the threads of the previous side are asleep."""
    sleep(SETTLING_SECONDS)


def in_turns(
    sides: Mapping[str, Callable[[], Any]], runs: int, joules: Callable[[], float | None] = lambda: None
) -> dict[str, Samples]:
    """Time every side ``runs`` times, in turns; ``joules`` reads an energy counter."""
    rows: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, work in sides.items():
            settle()
            cpu, energy = process_time(), joules()
            seconds = measure_time(work)[1]
            spent = None if energy is None else (joules() or energy) - energy
            rows[name].append((seconds, process_time() - cpu, spent))
    columns = {name: tuple(zip(*its, strict=True)) for name, its in rows.items()}
    return {
        name: Samples(clock, cpu, tuple(value for value in spent if value is not None))
        for name, (clock, cpu, spent) in columns.items()
    }
