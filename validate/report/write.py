"""The verdict on disk: a page for people, JSON for programs, Markdown and JUnit for pipelines."""

from pathlib import Path

from validate.files import write_files
from validate.report.report import ValidationReport
from validate.report.to_html import as_html
from validate.report.to_json import as_json
from validate.report.to_junit import as_junit
from validate.report.to_markdown import as_markdown


def write_report(report: ValidationReport, folder: Path) -> None:
    """Writes the report's files into ``folder``, over those of an earlier one."""
    files = {"report.json": as_json(report), "report.xml": as_junit(report)}
    files |= {"report.md": as_markdown(report).encode(), "report.html": as_html(report).encode()}
    write_files(folder, files)
