"""What a person sees: progress bars and lines of text."""

import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from wan22.progress import Progress
from wan22.quantities import human_bytes


class _Console(Console):
    """Prints every table in the same style, whichever room made it."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(styled(each) if isinstance(each, Table) else each for each in objects), **options)


def styled(table: Table) -> Table:
    """``table`` with a bold title on the left, one line under the headings, and columns of numbers to the right."""
    table.box, table.title_justify, table.title_style, table.pad_edge = SIMPLE_HEAD, "left", "bold", False
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        cells = [str(cell) for cell in column.cells if str(cell)]
        if cells and all(cell.lstrip("-+<≤≥ ")[:1].isdigit() for cell in cells) and table.show_header:
            column.justify = "right"
    return table


def tolerate_any_encoding() -> None:
    """Let a terminal in ASCII or Latin-1 show a question mark where it has no such character, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


console = _Console(highlight=False, soft_wrap=True, markup=False)  # names of files and prompts may hold brackets


@contextmanager
def bars(*, beside_json: bool = False) -> Iterator[Progress]:
    """One bar for every task that reports, kept on screen when it is full; nothing before the first one does.

    ``beside_json``: standard output is for a program, the bars go to standard error.
    """
    shown = Bars(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True) if beside_json else console,
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


def tell_unread(plans: Sequence[str]) -> None:
    """Of what :func:`runtime.built_for.check_plans` could not check."""
    if plans:
        console.print(f"{', '.join(plans)}: no word in clear of what they were built for; bundle.json is believed")


def command_line(program: str = "wan-trt") -> str:
    """The command as the user typed it, for manifests and reports."""
    return shlex.join([*program.split(), *sys.argv[1:]])
