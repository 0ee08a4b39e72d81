"""The wording of the ladder's rows, shared by the terminal, the page, Markdown and JUnit XML."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from validate.gate import Verdict, distinct_text
from validate.ladder.metrics import Metrics
from validate.ladder.row import InPrecision, Row
from validate.ladder.thresholds import Limit, Measure


@dataclass(frozen=True)
class Line:
    """A row as the page prints it."""

    row: Row
    found: str
    limit: str
    margin: str
    others: str  # the measures that have no limit here
    precision: str  # the error that the precision alone causes


def line(row: Row) -> Line:
    found = distinct_text(row.limit.found(row.metrics), row.limit.value, partial(measure_text, row.limit.measure))
    low = "" if row.in_precision is None else precision_text(row.in_precision)
    return Line(row, found, limit_text(row.limit), margin(row), others(row.metrics, row.limit.measure), low)


def precision_text(found: InPrecision) -> str:
    """The error of the reference in the lower precision, and the distance of ours from that reference."""
    alone, between = (
        metrics.problem or f"{number(metrics.relative_l2)} rel L2" for metrics in (found.alone, found.between)
    )
    return f"PyTorch in {found.precision}: {alone} from its float32; ours from that: {between}"


def number(value: float, more: int = 0) -> str:
    """Format with two significant digits plus ``more``; NaN becomes words, infinity a sign."""
    if math.isnan(value):
        return "not a number"
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞"
    return f"{value:.{1 + more}f}" if 1 <= abs(value) < 1e4 else f"{value:.{1 + more}e}"


def measure_text(measure: Measure, value: float, more: int = 0) -> str:
    """Format as :func:`number`, with more digits for measures whose values lie near 1."""
    digits = {"ssim": 6, "excess": 2}.get(measure)
    return f"{value:.{digits + more}f}" if digits and math.isfinite(value) else number(value, more)


def limit_text(limit: Limit) -> str:
    if limit.value == 0:
        return "equal"
    units = {"max_abs": "max abs", "relative_l2": "rel L2", "psnr_db": "dB", "excess": "times"}
    return f"{limit.sign} {limit.value:g} {units.get(limit.measure, limit.measure.upper())}"


def margin(row: Row) -> str:
    """The distance of the row from its limit, in words."""
    found, limit = row.limit.found(row.metrics), row.limit.value
    if math.isnan(found):
        return "cannot be compared"
    if row.limit.measure == "psnr_db":
        side = "above" if found >= limit else "short"
        return "identical" if math.isinf(found) else f"{abs(found - limit):.0f} dB {side}"
    if row.limit.measure == "ssim":
        return f"{number(abs(found - limit))} {'above' if found >= limit else 'short'}"
    if found == 0 or limit == 0:
        return "equal" if found == 0 else "differs"
    factor, side = (limit / found, "below") if found <= limit else (found / limit, "over")
    return f"{factor:,.{1 if factor < 10 else 0}f}× {side}"


def others(metrics: Metrics, measure: str) -> str:
    if metrics.problem or not metrics.values:
        return metrics.problem
    shown = {"max_abs": ("max abs", metrics.max_abs), "relative_l2": ("rel L2", metrics.relative_l2)}
    parts = [f"{label} {number(value)}" for name, (label, value) in shown.items() if name != measure]
    parts.append(f"cosine {metrics.cosine:.9f}".rstrip("0").rstrip("."))
    if metrics.psnr_db is not None and measure != "psnr_db":
        parts.append(f"PSNR {number(metrics.psnr_db)} dB")
    return " · ".join(parts)


def verdict_words(verdict: Verdict) -> tuple[str, str]:
    """The measured value and the limit."""
    sign = "≥" if verdict.gate.bound == "min" else "≤"
    return verdict.found_in_words, f"{sign} {verdict.gate.limit:g}"


def by_section(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The rows by section, in the order in which the sections first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(section_title(row), []).append(row)
    return list(found.items())


def section_title(row: Row) -> str:
    if row.subject.startswith("official"):
        return "Official code"
    if row.step is not None or row.subject == "latents":
        return "Latents, step by step"
    fixed = {"tokenizer": "Text", "text_encoder": "Text", "sampler": "Schedule, noise and solver", "video": "Video"}
    if row.component == "image" or row.component.startswith("vae_encoder"):
        return "Image"
    if row.component.startswith("vae_"):
        return "VAE"
    return fixed.get(row.component, f"Transformer, {row.component}")
