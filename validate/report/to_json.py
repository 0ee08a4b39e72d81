"""The report as JSON. NaN and infinity, which JSON cannot express, become the strings ``"nan"`` and ``"inf"``."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from validate.gate import Verdict
from validate.ladder.metrics import Metrics
from validate.ladder.row import InPrecision, Row
from validate.report.cache_report import worst_of
from validate.report.case_report import CaseReport
from validate.report.worst import worst_values

if TYPE_CHECKING:
    from validate.report.report import ValidationReport


def as_json(report: "ValidationReport") -> bytes:
    first = report.first_diverging_step
    content = {
        "passed": bool(report),
        "summary": report.summary(),
        "first_diverging_step": None if first is None else first.step,
        "facts": report.facts,
        "gates": [_verdict(verdict) for verdict in report.verdicts],
        "measured": finite({**worst_values(report.rows), **worst_of(case.cache for case in report.cases)}),
        "worst_case": report.worst_case.number,
        "cases": [_case(case) for case in report.cases],
        "rows": [_row(row) for row in report.rows],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _verdict(verdict: Verdict) -> dict[str, Any]:
    gate = verdict.gate
    return {
        "name": gate.measurement,
        "bound": gate.bound,
        "limit": gate.limit,
        "found": json_number(verdict.found),
        "passed": bool(verdict),
        **({"where": verdict.where} if verdict.where else {}),
    }


def _case(case: CaseReport) -> dict[str, Any]:
    return {
        "number": case.number,
        "prompt": case.prompt,
        "seed": case.seed,
        "failed": len(case.failed),
        "psnr_db": json_number(case.found("frames", "psnr_db")),
        "ssim": json_number(case.found("ssim", "ssim")),
        "command": case.command,
        "step_cache": None if case.cache is None else finite(case.cache.as_json()),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "subject": row.subject,
        "component": row.component,
        "case": row.case,
        "passed": row.passed,
        "measure": row.limit.measure,
        "limit": row.limit.value,
        "reason": row.limit.reason,
        "note": row.note,
        "step": row.step,
        "timestep": row.timestep,
        "made": row.made,
        "seconds": row.seconds,
        "metrics": _metrics(row.metrics),
        "in_precision": None if row.in_precision is None else _in_precision(row.in_precision),
    }


def _in_precision(found: InPrecision) -> dict[str, Any]:
    return {
        "precision": str(found.precision),
        "reference_alone": _metrics(found.alone),
        "ours_against_it": _metrics(found.between),
    }


def _metrics(metrics: Metrics) -> dict[str, Any]:
    return {name: json_number(value) for name, value in asdict(metrics).items()}


def finite(value: Any) -> Any:
    """``value`` with :func:`json_number` applied to everything in it."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list) else json_number(value)


def json_number(value: Any) -> Any:
    """``value``, or its text if it is a number that JSON cannot express."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
