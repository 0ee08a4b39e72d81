"""The report as Markdown, for a CI summary or a comment: verdict, gates, sections and failed checks."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from validate.report.text import by_section, line, number, verdict_words

if TYPE_CHECKING:
    from validate.report.report import ValidationReport


def as_markdown(report: "ValidationReport") -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: "ValidationReport") -> Iterator[str]:
    mark = "✅" if report else "❌"
    yield f"# {mark} Parity of {report.facts.get('model', '')} {report.facts.get('precision', '').partition(';')[0]}"
    yield from ("", _text(report.summary()), "")
    if not_judged := report.attached.not_judged:
        yield from (_text(f"Gates: {not_judged}."), "")
    if report.verdicts:
        verdicts = [(_mark(bool(v)), v.gate.measurement, *verdict_words(v)) for v in report.verdicts]
        yield from _table(("", "gate", "found", "limit"), verdicts)
    counted = [(title, len(rows), sum(row.passed for row in rows)) for title, rows in by_section(report.rows)]
    sections = [(_mark(passed == rows), title, f"{passed} of {rows}") for title, rows, passed in counted]
    yield from _table(("", "section", "passed"), sections)
    if report.worst_case.cache is not None:
        yield from (_text(report.worst_case.cache.summary()), "")
    if report.failed:
        shown = [(row, line(row)) for row in report.failed]
        failed = [(f"case {row.case}: {row.name}", row.component, its.found, its.limit) for row, its in shown]
        yield from _table(("failed check", "component", "found", "limit"), failed)
    if len(report.cases) > 1:
        cases = [
            (
                _mark(not case.failed),
                str(case.number),
                case.prompt,
                str(case.seed),
                number(case.found("frames", "psnr_db")),
            )
            for case in report.cases
        ]
        yield from _table(("", "case", "prompt", "seed", "PSNR, dB"), cases)
        yield from (f"Worst: case {report.worst_case.number}.", "", "```sh", report.worst_case.command, "```", "")
    yield from _table(("", ""), list(report.facts.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(_text, row))} |"
    yield ""


def _mark(passed: bool) -> str:
    return "✅" if passed else "❌"


def _text(text: str) -> str:
    """``text`` on one line, with Markdown's special characters escaped."""
    for special in "\\|`*_<[":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())
