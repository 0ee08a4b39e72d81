"""A bench beside an earlier one: what got slower or larger, and what may be compared at all.

On the machine of the baseline everything is compared; on another one only ratios of sides that ran there together. A
change counts when it is beyond the tolerance and, for timings, beyond the spread that both runs had themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.machine import BUSY
from validate.bench.result import OF_MEMORY, BenchResult
from validate.bench.work import RUN
from wan22.errors import UserError

TOLERANCE = 0.05
HIGHER_IS_BETTER = ("speedup", "roofline_percent")
RATIOS = ("speedup", "memory_ratio")  # what stays meaningful on another machine
NEUTRAL = (  # told by their neighbours, or no merit
    "vae_share_percent", "host_overhead_percent", "speedup_p10", "step_speedup_p10", "cpu_speedup", "p90_ms",
    "total_p90_s", "cpu_median_ms", "relative_l2",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    measurement: str
    before: float
    after: float
    spread: float  # relative, of the noisier run

    @property
    def worse(self) -> float:
        """How much worse, relative: 0.1 is 10 %; negative is better."""
        if not self.before or not self.after:
            return 0.0
        return (self.before / self.after if is_better_when_higher(self.measurement) else self.after / self.before) - 1

    @property
    def is_regression(self) -> bool:
        return self.worse > max(TOLERANCE, self.spread)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"worse_percent": 100 * self.worse}


@dataclass(frozen=True)
class BaselineComparison:
    baseline: Path
    same_machine: bool
    told: str  # which machines, when they differ
    busy: bool  # one of the two was made while others used the machine
    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.is_regression)


def is_better_when_higher(measurement: str) -> bool:
    return any(part in measurement.rpartition(".")[2] for part in HIGHER_IS_BETTER)


def check_comparable(path: Path, baseline: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises UserError, naming the first field, when the baseline measured something else."""
    for field, value in facts.items():
        if (found := baseline.get(field)) != value:
            raise UserError(
                f"baseline {path}: {field} {found!r}", f"{value!r} of this run", "run both with the same options"
            )


def compare(path: Path, baseline: Mapping[str, Any], result: BenchResult) -> BaselineComparison:
    """Of measurements that both have. ``baseline`` is what ``read_bench`` gave."""
    same = baseline["machine"] == dict(result.machine)
    before, after, now = baseline["measurements"], result.measurements(), result.as_json()
    names = [name for name in before if after.get(name) and _counts(name, same)]
    spread = {name: max(_spread(name, before), _spread(name, now["measurements"])) for name in names}
    changes = tuple(Change(name, before[name], after[name], spread[name]) for name in names)
    differing = [key for key in result.machine if baseline["machine"].get(key) != result.machine[key]]
    told = ", ".join(f"{key} {baseline['machine'].get(key)!r}, here {result.machine[key]!r}" for key in differing)
    return BaselineComparison(path, same, told, was_busy(baseline) or was_busy(now), changes)


def was_busy(found: Mapping[str, Any]) -> bool:
    """Whether others wanted the cores when a bench began."""
    return bool(found["conditions"].get("load_average", [0])[0] > BUSY * found["machine"].get("cores", 1))


def _counts(name: str, same_machine: bool) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf in NEUTRAL:
        return False
    return same_machine or any(part in leaf for part in RATIOS)


def _spread(name: str, measurements: Mapping[str, float]) -> float:
    """Relative, as far as the run tells: from median to p90 of a timing, from p10 to median of a speed-up.

    Whatever is timed in whole runs has the spread of their total.
    """
    piece, _, leaf = name.rpartition(".")
    if leaf == "median_ms":
        return _beyond(measurements.get(f"{piece}.p90_ms"), measurements.get(name))
    if f"{name}_p10" in measurements:
        return _beyond(measurements[name], measurements[f"{name}_p10"])
    if piece != RUN or leaf in OF_MEMORY:
        return 0.0
    return _beyond(measurements.get(f"{RUN}.total_p90_s"), measurements.get(f"{RUN}.total_s"))


def _beyond(larger: float | None, smaller: float | None) -> float:
    """How much larger, relative; nothing where one is missing or zero."""
    return larger / smaller - 1 if larger and smaller else 0.0
