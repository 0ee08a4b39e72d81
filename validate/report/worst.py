"""What gates may ask about: the worst number of every subject over all its rows and all cases."""

import math
from collections.abc import Iterable, Mapping

from validate.ladder.row import Row
from validate.ladder.thresholds import AT_LEAST

MEASURES = ("max_abs", "relative_l2", "psnr_db", "ssim", "lpips", "excess")
FAILED = "checks.failed"  # rows beyond the project's own limits


def known() -> tuple[str, ...]:
    """Every name that a validation of some model can measure."""
    from validate.ladder.rungs import rungs
    from wan22.specs import SPECS

    ladders = (rungs(spec, official=True) for spec in SPECS.values())
    names = [f"{rung.subject}.{measure}" for ladder in ladders for rung in ladder for measure in rung.measures]
    return (FAILED, *dict.fromkeys(names))


def measured(rows: Iterable[Row]) -> Mapping[str, float]:
    """By name, ``velocity.relative_l2``; NaN where a row could not be compared."""
    found: dict[str, float] = {FAILED: 0.0}
    for row in rows:
        found[FAILED] += not row.passed
        for measure, value in _stated(row).items():
            name = f"{row.subject}.{measure}"
            found[name] = _worse(measure, found.get(name), value)
    return found


def _stated(row: Row) -> dict[str, float]:
    """The measures of ``row`` that say something; NaN for the one it is about where it could not be compared."""
    if row.metrics.problem:
        return {row.limit.measure: math.nan}
    measures = MEASURES if row.metrics.values else (row.limit.measure,)
    values = {measure: getattr(row.metrics, measure) for measure in measures}
    return {measure: value for measure, value in values.items() if value is not None}


def _worse(measure: str, one: float | None, other: float) -> float:
    if one is None or math.isnan(other):
        return other
    return min(one, other) if measure in AT_LEAST else max(one, other)  # a NaN in ``one`` stays, being first
