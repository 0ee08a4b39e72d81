"""The verdict on disk: a page for people, JSON for programs, Markdown and JUnit for pipelines."""

from validate.report.report import ValidationReport
from validate.report.to_html import as_html
from validate.report.to_json import as_json
from validate.report.to_junit import as_junit
from validate.report.to_markdown import as_markdown
from wan22.files import Claim, write_files

MAIN = "report.json"


def write_report(report: ValidationReport, claimed: Claim) -> None:
    """Writes the report's files beside the claimed :data:`MAIN`, over those of an earlier one."""
    write_files(
        claimed,
        {
            MAIN: lambda: as_json(report),
            "report.xml": lambda: as_junit(report),
            "report.md": lambda: as_markdown(report).encode(),
            "report.html": lambda: as_html(report).encode(),
        },
    )
