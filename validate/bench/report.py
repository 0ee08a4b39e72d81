"""A bench with its criteria: an earlier bench, the baseline, and a file of gates.

On the machine of the baseline all measurements are compared; on another machine only ratios between sides of the same
bench. A change counts if it exceeds the tolerance and, for timings, the spread of both benches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.machine import BUSY
from validate.bench.result import OF_MEMORY, BenchResult
from validate.bench.step_cache import SUBJECT
from validate.bench.work import RUN
from validate.gate import Verdict
from wan22.errors import UserError

TOLERANCE = 0.05
HIGHER_IS_BETTER = ("speedup", "roofline_percent")
RATIOS = ("speedup", "memory_ratio")  # meaningful across machines
NEUTRAL = (  # implied by other measurements, or neither good nor bad
    "vae_share_percent", "host_overhead_percent", "speedup_p10", "step_speedup_p10", "cpu_speedup", "p90_ms",
    "total_p90_s", "cpu_median_ms", "stream_hidden_step_ms", "relative_l2", "saved_percent", "skipped_steps",
    "overhead_percent",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    measurement: str
    before: float
    after: float
    spread: float  # relative, of the noisier bench

    @property
    def worse(self) -> float:
        """The relative change for the worse: 0.1 is 10 % worse, negative is better."""
        if not self.before or not self.after:
            return 0.0
        higher_is_better = any(part in self.measurement.rpartition(".")[2] for part in HIGHER_IS_BETTER)
        return (self.before / self.after if higher_is_better else self.after / self.before) - 1

    @property
    def is_regression(self) -> bool:
        return self.worse > max(TOLERANCE, self.spread)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"worse_percent": 100 * self.worse}


@dataclass(frozen=True)
class BaselineComparison:
    baseline: Path
    same_machine: bool
    difference: str  # how the machines differ; empty if they do not
    busy: bool  # another load used the machine during one of the two
    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.is_regression)


@dataclass(frozen=True)
class Criteria:
    gate: Path | None = None  # TOML, see :mod:`validate.gate`
    baseline: Path | None = None  # JSON of an earlier bench


@dataclass(frozen=True)
class BenchReport:
    """True if every gate holds and the timings can be trusted.

    Regressions fail a bench only through a gate on ``compare.regressions``.
    """

    result: BenchResult
    comparison: BaselineComparison | None = None
    verdicts: tuple[Verdict, ...] = ()

    def __bool__(self) -> bool:
        return all(self.verdicts) and not self.result.faults

    def as_json(self) -> dict[str, Any]:
        found = self.result.as_json() | {"passed": bool(self)}
        if self.comparison is not None:
            found["compare"] = {
                "baseline": str(self.comparison.baseline),
                "same_machine": self.comparison.same_machine,
                "regressions": [change.as_json() for change in self.comparison.regressions],
            }
        if self.verdicts:
            found["gates"] = [verdict.as_json() for verdict in self.verdicts]
        return found


def check_comparable(path: Path, baseline: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise UserError, with the first differing field, if the baseline measured something else."""
    for field, value in facts.items():
        if (found := baseline.get(field)) != value:
            what = f"baseline {path}: {field} {found!r}"
            raise UserError(what, f"{value!r} of this run", "run both with the same options")


def compare(path: Path, baseline: Mapping[str, Any], result: BenchResult) -> BaselineComparison:
    """Compare the measurements that both benches have; ``baseline`` comes from ``read_bench``."""
    same = baseline["machine"] == dict(result.machine)
    before, after, now = baseline["measurements"], result.measurements(), result.as_json()
    other_cache = baseline.get(SUBJECT, {}).get("settings") != now.get(SUBJECT, {}).get("settings")
    names = [name for name in before if after.get(name) and _counts(name, same)]
    names = [name for name in names if not (other_cache and name.startswith(f"{SUBJECT}."))]
    spread = {name: max(_spread(name, before), _spread(name, now["measurements"])) for name in names}
    changes = tuple(Change(name, before[name], after[name], spread[name]) for name in names)
    differing = [key for key in result.machine if baseline["machine"].get(key) != result.machine[key]]
    difference = ", ".join(f"{key} {baseline['machine'].get(key)!r}, here {result.machine[key]!r}" for key in differing)
    return BaselineComparison(path, same, difference, was_busy(baseline) or was_busy(now), changes)


def was_busy(found: Mapping[str, Any]) -> bool:
    """True if other processes used the cores when the bench began."""
    return bool(found["conditions"].get("load_average", [0])[0] > BUSY * found["machine"].get("cores", 1))


def _counts(name: str, same_machine: bool) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf in NEUTRAL:
        return False
    return same_machine or any(part in leaf for part in RATIOS)


def _spread(name: str, measurements: Mapping[str, float]) -> float:
    """The relative spread: from median to p90 of a timing, from p10 to median of a speed-up, 0 if unknown.

    Timings of end-to-end runs have the spread of their total.
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
    """How much larger, relative; 0 if one is missing or zero."""
    return larger / smaller - 1 if larger and smaller else 0.0
