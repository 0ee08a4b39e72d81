"""The values that gates judge: the worst of every subject and measure over all rows and cases."""

import math
from collections.abc import Iterable, Mapping

from validate.ladder.row import Row
from validate.ladder.thresholds import AT_LEAST
from validate.report.cache_report import MEASURED, SUBJECT

MEASURES = ("max_abs", "relative_l2", "psnr_db", "ssim", "lpips", "excess")
FAILED = "checks.failed"  # number of rows that miss their limit


def known() -> tuple[str, ...]:
    """Every name that a validation of any model can measure."""
    from validate.ladder.rungs import rungs
    from wan22.specs import SPECS

    ladders = (rungs(spec, official=True) for spec in SPECS.values())
    names = [f"{rung.subject}.{measure}" for ladder in ladders for rung in ladder for measure in rung.measures]
    return (FAILED, *dict.fromkeys(names), *(f"{SUBJECT}.{name}" for name in MEASURED))


def worst_values(rows: Iterable[Row]) -> Mapping[str, float]:
    """The worst values by name, such as ``velocity.relative_l2``; NaN if a row could not be compared."""
    found: dict[str, float] = {FAILED: 0.0}
    for row in rows:
        found[FAILED] += not row.passed
        for measure, value in _values(row).items():
            name = f"{row.subject}.{measure}"
            found[name] = _worse(measure, found.get(name), value)
    return found


def _values(row: Row) -> dict[str, float]:
    """The measures that ``row`` has; if it could not be compared, NaN for the measure of its limit."""
    if row.metrics.problem:
        return {row.limit.measure: math.nan}
    measures = MEASURES if row.metrics.values else (row.limit.measure,)
    values = {measure: getattr(row.metrics, measure) for measure in measures}
    return {measure: value for measure, value in values.items() if value is not None}


def _worse(measure: str, one: float | None, other: float) -> float:
    if one is None or math.isnan(other):
        return other
    return min(one, other) if measure in AT_LEAST else max(one, other)  # min and max keep a NaN in ``one``
