"""The report as a self-contained page: no network, no scripts, embedded pictures, responsive, light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from validate.bench.report import was_busy
from validate.html import page
from validate.ladder.metrics import why_no_lpips
from validate.ladder.row import Row
from validate.plots import drift_plot, in_all_themes
from validate.report.text import Line, by_section, limit_text, line, number, verdict_words
from wan22.quantities import counted

if TYPE_CHECKING:
    from validate.report.case_report import CaseReport
    from validate.report.report import ValidationReport

STEPS_SHOWN_OPEN = 12


def as_html(report: "ValidationReport") -> str:
    case = report.worst_case
    shown = {
        "report": report,
        "shown": case,
        "sections": sections(report),
        "plots": in_all_themes(partial(drift_plot, case.steps)) if case.steps else {},
        "lights": status_lights(report),
        "headlines": headlines(case),
        "reasons": reasons(report.rows),
        "compared": "Graphs" if (manifest := report.attached.manifest) and manifest.build is None else "Engines",
        "apart": precision_losses(report.rows),
        "latency_columns": LATENCY_COLUMNS,
        "latency": latency(report.attached.bench) if report.attached.bench else None,
        "no_lpips": why_no_lpips(),
    }
    return page("report.html.j2", shown, {"number": number, "verdict_words": verdict_words})


HEADLINES = {
    "frames": "PSNR of the video, dB",
    "ssim": "SSIM, worst frame",
    "frame_changes": "PSNR of its changes, dB",
    "lpips": "LPIPS, worst frame",
    "latents": "last latents, rel L2",
}


def headlines(case: "CaseReport") -> dict[str, Line]:
    """The rows that decide a release, by label: the end of the run and the video."""
    found = {}
    for subject, label in HEADLINES.items():
        rows = [row for row in case.rows if row.subject == subject and row.limit.measure != "excess"]
        if rows:
            found[label] = line(rows[-1])
    return found


def reasons(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """The reasons for the limits, by the limit in words and its subject."""
    return {(limit_text(row.limit), row.subject.replace("_", " ")): row.limit.reason for row in rows}


@dataclass(frozen=True)
class PrecisionLoss:
    """The worst relative L2 errors of a section whose precision is not float32."""

    title: str
    precision: str
    total: float
    alone: float  # the reference in that precision against float32
    between: float  # the engines against the reference in that precision


def precision_losses(rows: Sequence[Row]) -> list[PrecisionLoss]:
    found = []
    for title, its in by_section(rows):
        low = [(row.metrics, row.in_precision) for row in its if row.in_precision is not None]
        if low:
            errors = [(total.relative_l2, its.alone.relative_l2, its.between.relative_l2) for total, its in low]
            found.append(PrecisionLoss(title, str(low[0][1].precision), *map(_largest, zip(*errors, strict=True))))
    return found


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


@dataclass(frozen=True)
class StatusLight:
    """One summary line for the release decision. ``tone`` is "good", "bad" or, if nothing was measured, "none"."""

    title: str
    tone: str
    text: str
    where: str  # id of the section on the page


def status_lights(report: "ValidationReport") -> list[StatusLight]:
    its, missed = report.attached, len(report.missed)
    faults = its.bench["faults"] if its.bench else []
    problems = [problem for engine in its.fusion for problem in engine["problems"]]
    parity = f"{len(report.rows) - len(report.failed)} of {counted(len(report.rows), 'check')} passed"
    kept = f"{len(report.verdicts) - missed} of {len(report.verdicts)} kept" if report.verdicts else "no --gate given"
    kept = "; ".join(filter(None, (kept, its.not_judged)))
    busy = its.bench is not None and was_busy(its.bench)
    timed = "no --bench given"
    if its.bench:
        timed = "; ".join(faults) or ("measured on a busy machine: measure again" if busy else "measured")
    fused = "; ".join(problems) or f"{len(its.fusion)} engines inspected" if its.fusion else its.why_no_fusion
    return [
        StatusLight("Parity", "good" if report.rows and not report.failed else "bad", parity, "checks"),
        StatusLight("Gates", _tone(report.verdicts, not missed), kept, "gates"),
        StatusLight("Latency", _tone(faults or (its.bench and not busy), not faults), timed, "latency"),
        StatusLight("Fusion", _tone(its.fusion, not problems), fused, "fusion"),
    ]


def _tone(measured: object, good: bool) -> str:
    return "none" if not measured else "good" if good else "bad"


LATENCY_COLUMNS = {
    "median_ms": "median, ms",
    "p90_ms": "p90, ms",
    "speedup": "PyTorch's time over ours",
    "roofline_percent": "roofline, %",
    "memory_ratio": "our memory over PyTorch's",
}


def latency(bench: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The bench's measurements: piece → column → value. End-to-end runs keep their own column names."""
    figures: dict[str, dict[str, float | None]] = {}
    for name, value in bench["measurements"].items():
        piece, _, measure = name.partition(".")
        figures.setdefault(piece, {})[measure] = value
    return figures


@dataclass(frozen=True)
class Section:
    title: str
    rows: tuple[Line, ...]
    passed: int
    open: bool


def sections(report: "ValidationReport") -> list[Section]:
    """The rows by section; a section is open if it is short or has failures."""
    result = []
    for title, rows in by_section(report.rows):
        passed = sum(row.passed for row in rows)
        shown = passed < len(rows) or len(rows) <= STEPS_SHOWN_OPEN
        result.append(Section(title, tuple(map(line, rows)), passed, shown))
    return result
