"""The verdict and its two files: ``report.json`` for programs, ``report.html`` for people.

In the JSON a number that is not finite is written as the text ``"nan"`` or ``"inf"``, which JSON itself cannot say.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from validate.figures import Filmstrip
from validate.metrics import Metrics
from validate.page import as_html
from validate.row import InPrecision, Row
from validate.wording import line
from wan22.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ValidationReport:
    """All rows of the ladder, true when every one passed. ``facts`` says what was compared, in the order to print."""

    rows: tuple[Row, ...]
    facts: dict[str, str]
    filmstrip: Filmstrip | None = None

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def steps(self) -> list[Row]:
        """The rows of the run, in order."""
        return [row for row in self.rows if row.step is not None]

    @property
    def first_diverging_step(self) -> Row | None:
        return next((row for row in self.steps if not row.passed), None)

    def summary(self) -> str:
        """The verdict in one line."""
        if self:
            return f"{len(self.rows)} of {len(self.rows)} checks passed"
        if not self.rows:
            return "nothing was checked"
        first, step = self.failed[0], self.first_diverging_step
        told = f"{len(self.failed)} of {len(self.rows)} checks failed, the first: {first.name} ({first.component})"
        if step is None:
            return told
        return f"{told}; first diverging step: {step.step}, t = {step.timestep:g}, {step.component}"

    def table(self) -> "Table":
        """The rows for a terminal."""
        from rich.table import Table

        table = Table("", "check", "component", "found", "limit", "margin")
        for row in self.rows:
            shown = line(row)
            mark = "[green]✓[/]" if row.passed else "[red]✗[/]"
            table.add_row(mark, row.name, row.component, shown.found, shown.limit, shown.margin)
        return table


def check_writable(folder: Path) -> None:
    """Makes ``folder``, before the long work; raises UserError when it cannot be."""
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"cannot write the report to {folder}: {error.strerror}"
        raise UserError(found, "a writable folder with free space", "name another with -o") from error


def write_report(report: ValidationReport, folder: Path) -> None:
    """Writes both files into ``folder``, over those of an earlier report."""
    write_files(folder, {"report.json": as_json(report), "report.html": as_html(report).encode()})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes contents by name into ``folder``, each file whole or not at all.

    Raises:
        UserError: the folder cannot be made or written.
    """
    check_writable(folder)
    for name, content in files.items():
        with _refusing(folder):
            _replace(folder / name, content)


def _replace(path: Path, content: bytes) -> None:
    """Writes beside ``path`` and renames, so that a reader never meets half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(report: ValidationReport) -> bytes:
    first = report.first_diverging_step
    content = {
        "passed": bool(report),
        "summary": report.summary(),
        "first_diverging_step": None if first is None else first.step,
        "facts": report.facts,
        "rows": [_json_row(row) for row in report.rows],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _json_row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "subject": row.subject,
        "component": row.component,
        "passed": row.passed,
        "measure": row.limit.measure,
        "limit": row.limit.value,
        "reason": row.limit.reason,
        "note": row.note,
        "step": row.step,
        "timestep": row.timestep,
        "made": row.made,
        "metrics": _json_metrics(row.metrics),
        "in_precision": None if row.in_precision is None else _json_in_precision(row.in_precision),
    }


def _json_in_precision(found: InPrecision) -> dict[str, Any]:
    return {
        "precision": str(found.precision),
        "reference_alone": _json_metrics(found.alone),
        "ours_against_it": _json_metrics(found.between),
    }


def _json_metrics(metrics: Metrics) -> dict[str, Any]:
    return {name: _json_number(value) for name, value in asdict(metrics).items()}


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
