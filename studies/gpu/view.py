"""A run on a GPU as a table that fits a terminal."""

from collections.abc import Sequence

from rich.table import Table

from studies.gpu.stage import Measurement, StageResult

DONE = ("measured", "ran")


def table_of(answers: Sequence[StageResult]) -> Table:
    """One row per measurement, and one per stage that was not measured."""
    table = Table("stage", "what", "figure", "note", box=None, pad_edge=False)
    for answer in answers:
        title = answer.stage.title
        for row in answer.measurements:
            table.add_row(title, row.what, _figure(row), row.note)
            title = ""
        if answer.status not in DONE or not answer.measurements:
            table.add_row(title, answer.status, "", answer.reason)
    return table


def _figure(row: Measurement) -> str:
    if row.value is None:
        return ""
    digits = f"{row.value:.0f}" if float(row.value).is_integer() else f"{row.value:.4g}"
    return f"{digits} {row.unit}".strip()
