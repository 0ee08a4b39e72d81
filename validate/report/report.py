"""The verdict of a validation; on disk an HTML page, JSON for programs, Markdown and JUnit XML for CI."""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from validate.gate import Verdict, check_mark, judge
from validate.ladder.row import Row
from validate.report.cache_report import worst_of
from validate.report.case_report import CaseReport
from validate.report.extras import Attachments
from validate.report.text import line
from validate.report.to_html import as_html
from validate.report.to_json import as_json
from validate.report.to_junit import as_junit
from validate.report.to_markdown import as_markdown
from validate.report.worst import FAILED, worst_values
from wan22.errors import UserError
from wan22.files import Claim, claim, write_files
from wan22.quantities import counted


@dataclass(frozen=True)
class ValidationReport:
    """The rows of all cases; true if there are any, all pass and every gate holds.

    ``facts`` describes the comparison, label → text, in print order.
    """

    cases: tuple[CaseReport, ...]
    facts: dict[str, str]
    attached: Attachments = field(default_factory=Attachments)

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.failed and all(self.verdicts)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for case in self.cases for row in case.rows)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts on the gates; gates on the bench come last."""
        measured = {**worst_values(self.rows), **worst_of(case.cache for case in self.cases)}
        ours = (self._with_case(verdict) for verdict in judge(self.attached.gates, measured))
        bench = self.attached.bench
        return (*ours, *(() if bench is None else judge(self.attached.bench_gates, bench["measurements"])))

    def _with_case(self, verdict: Verdict) -> Verdict:
        """Add the case that has the worst value. A sum over cases has no such case."""
        name = verdict.gate.measurement
        if len(self.cases) == 1 or verdict.found is None or name == FAILED:
            return verdict
        each = {case.number: {**worst_values(case.rows), **worst_of([case.cache])} for case in self.cases}
        found = {number: its[name] for number, its in each.items() if name in its}
        guilty = next(number for number, value in found.items() if value == verdict.found or math.isnan(value))
        return replace(verdict, where=f"case {guilty}")

    @property
    def missed(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict)

    @property
    def worst_case(self) -> CaseReport:
        return max(self.cases, key=lambda case: case.badness)

    @property
    def steps(self) -> list[Row]:
        """The rows of the worst case's run, in order."""
        return self.worst_case.steps

    @property
    def first_diverging_step(self) -> Row | None:
        return next((row for case in self.cases for row in case.steps if not row.passed), None)

    @property
    def first_not_finite(self) -> Row | None:
        """The first row with NaN or infinity: inputs come first, then the runs, then all others."""

        def depth(row: Row) -> tuple[int, int]:
            if row.subject in ("token_ids", "embeddings", "pixels", "encode", "condition"):
                return row.case, 0
            return row.case, 1 if row.step is not None else 2

        return min((row for row in self.rows if "NaN" in row.metrics.problem), key=depth, default=None)

    def summary(self) -> str:
        """The verdict in one line."""
        if not self.rows:
            return "nothing was checked"
        return "; ".join((*self._row_sentences(), *(f"gate missed: {verdict}" for verdict in self.missed)))

    def _row_sentences(self) -> Iterator[str]:
        if not self.failed:
            yield f"{len(self.rows)} of {counted(len(self.rows), 'check')} passed"
            return
        first, step, bad = self.failed[0], self.first_diverging_step, self.first_not_finite
        failed = f"{len(self.failed)} of {counted(len(self.rows), 'check')} failed"
        yield f"{failed}, the first: {first.name} ({first.component})"
        if step is not None:
            yield f"first diverging step: {step.step}, t = {step.timestep:g}, {step.component}"
        if bad is not None:
            yield f"first not finite: {bad.name} ({bad.metrics.problem})"
        if len(self.cases) > 1:
            yield f"worst case: {self.worst_case.number}"

    def table(self) -> Table:
        """The rows for a terminal, by component: all rows of the first case, only failed rows of the others."""
        table, component = Table("", "check", "found", "limit", "margin"), ""
        for row in self.rows:
            if row.case == 1 or not row.passed:
                if row.component != component:
                    component = row.component
                    table.add_row("", Text(component, "bold"))
                shown = line(row)
                name = row.name if row.case == 1 else f"case {row.case}: {row.name}"
                table.add_row(check_mark(row.passed), name, shown.found, shown.limit, shown.margin)
        return table


FILES: dict[str, Callable[[ValidationReport], bytes]] = {
    "report.json": as_json,
    "report.xml": as_junit,
    "report.md": lambda report: as_markdown(report).encode(),
    "report.html": lambda report: as_html(report).encode(),
}


def write_report(report: ValidationReport, claimed: Claim) -> None:
    """Write all files of the report into the folder of ``claimed``, replacing those of an earlier report.

    Raises:
        UserError: the files cannot be written there. They are then in a temporary folder that the error names.
    """
    files = {name: partial(content, report) for name, content in FILES.items()}
    try:
        write_files(claimed, files)
    except (UserError, OSError) as error:
        spare = Path(tempfile.mkdtemp(prefix="wan-trt-report-"))
        with claim(spare / "report.json") as other:
            write_files(other, files)
        found = error.found if isinstance(error, UserError) else f"cannot write the report: {error.strerror}"
        raise UserError(found, f"a writable folder; the report is in {spare}", "copy it from there") from error
