"""How a row of the ladder is put into words, the same in the terminal and on the page."""

import math
from dataclasses import dataclass

from validate.metrics import Metrics
from validate.row import InPrecision, Row
from validate.thresholds import Limit


@dataclass(frozen=True)
class Line:
    """A row as the page prints it."""

    row: Row
    found: str
    limit: str
    margin: str
    others: str  # the measures that the limit is not about
    precision: str  # what the precision costs by itself


def line(row: Row) -> Line:
    found = number(row.limit.found(row.metrics))
    low = "" if row.in_precision is None else precision(row.in_precision)
    return Line(row, found, limit_text(row.limit), margin(row), others(row.metrics, row.limit.measure), low)


def precision(found: InPrecision) -> str:
    """Where no number of ours is in it: the reference in the lower precision; and what is left between the two."""
    alone, between = (
        metrics.problem or f"{number(metrics.relative_l2)} rel L2" for metrics in (found.alone, found.between)
    )
    return f"PyTorch in {found.precision}: {alone} from its float32; ours from that: {between}"


def number(value: float) -> str:
    """Two significant digits, with words for the extremes."""
    if math.isnan(value):
        return "not a number"
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞"
    return f"{value:.1f}" if 1 <= abs(value) < 1e4 else f"{value:.1e}"


def limit_text(limit: Limit) -> str:
    if limit.value == 0:
        return "equal"
    unit = {"max_abs": "max abs", "relative_l2": "rel L2", "psnr_db": "dB", "excess": "times"}[limit.measure]
    return f"{limit.sign} {limit.value:g} {unit}"


def margin(row: Row) -> str:
    """How far the row is from its limit."""
    found, limit = row.limit.found(row.metrics), row.limit.value
    if math.isnan(found):
        return "cannot be compared"
    if row.limit.measure == "psnr_db":
        return "identical" if math.isinf(found) else _decibels(found - limit)
    if found == 0 or limit == 0:
        return "equal" if found == 0 else "differs"
    factor, side = (limit / found, "below") if found <= limit else (found / limit, "over")
    return f"{factor:,.{1 if factor < 10 else 0}f}× {side}"


def _decibels(margin: float) -> str:
    return f"{abs(margin):.0f} dB {'above' if margin >= 0 else 'short'}"


def others(metrics: Metrics, measure: str) -> str:
    if metrics.problem or not metrics.values:
        return metrics.problem
    shown = {"max_abs": ("max abs", metrics.max_abs), "relative_l2": ("rel L2", metrics.relative_l2)}
    parts = [f"{label} {number(value)}" for name, (label, value) in shown.items() if name != measure]
    parts.append(f"cosine {metrics.cosine:.9f}".rstrip("0").rstrip("."))
    if metrics.psnr_db is not None and measure != "psnr_db":
        parts.append(f"PSNR {number(metrics.psnr_db)} dB")
    return " · ".join(parts)
