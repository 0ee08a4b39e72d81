"""A bench with what it was held to: an earlier bench, a file of gates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.compare import BaselineComparison
from validate.bench.result import BenchResult
from validate.gate import Verdict


@dataclass(frozen=True)
class Criteria:
    gate: Path | None = None  # TOML, see validate.gate
    baseline: Path | None = None  # JSON of an earlier bench


@dataclass(frozen=True)
class BenchReport:
    """True when every gate was passed and nothing forbids to trust the times.

    Regressions alone fail nothing, a gate on ``compare.regressions`` does.
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
