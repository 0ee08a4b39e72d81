"""A bench with its criteria: an earlier bench and a file of gates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.compare import BaselineComparison
from validate.bench.result import BenchResult
from validate.gate import Verdict


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
