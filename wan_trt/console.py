"""Terminal output: progress bars, tables and lines of text."""

import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from wan22.progress import Progress
from wan22.quantities import human_bytes


class _Console(Console):
    """A console that prints all tables in the same style."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(apply_style(each) if isinstance(each, Table) else each for each in objects), **options)


def apply_style(table: Table) -> Table:
    """Give ``table`` a bold title on the left, a line under the headings and right-aligned numbers; return it."""
    table.box, table.title_justify, table.title_style, table.pad_edge = SIMPLE_HEAD, "left", "bold", False
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        cells = [str(cell) for cell in column.cells if str(cell)]
        if cells and all(cell.lstrip("-+<≤≥ ")[:1].isdigit() for cell in cells) and table.show_header:
            column.justify = "right"
    return table


def tolerate_any_encoding() -> None:
    """Print a question mark for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


console = _Console(highlight=False, soft_wrap=True, markup=False)  # file names and prompts may contain brackets


@contextmanager
def bars(*, to_stderr: bool = False) -> Iterator[Progress]:
    """Show one bar for every task that reports progress. Full bars stay on screen.

    Pass ``to_stderr`` if standard output is read by a program.
    """
    shown = Bars(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True) if to_stderr else console,
    )
    tasks: dict[str, TaskID] = {}

    def progress(task: str, done: int, total: int, unit: str = "") -> None:
        if task not in tasks:
            shown.start()
            tasks[task] = shown.add_task(task, total=total, amount="")
        seconds = shown.tasks[tasks[task]].elapsed or 0.0
        shown.update(tasks[task], completed=done, total=total, amount=_amount(done, total, unit, seconds))

    try:
        yield progress
    finally:
        if tasks:
            shown.stop()


def _amount(done: int, total: int, unit: str, seconds: float) -> str:
    if unit != "bytes":
        return f"{done}/{total} {unit}"
    rate = f", {human_bytes(done / seconds)}/s" if seconds > 0 else ""
    return f"{human_bytes(done)} of {human_bytes(total)}{rate}"


def report_unstamped(plans: Sequence[str]) -> None:
    """Print the plans that :func:`runtime.built_for.check_plans` could not check."""
    if plans:
        console.print(f"{', '.join(plans)}: no readable build target; trusting bundle.json")


def command_line(program: str = "wan-trt") -> str:
    """The command as the user typed it, for manifests and reports."""
    return shlex.join([*program.split(), *sys.argv[1:]])
