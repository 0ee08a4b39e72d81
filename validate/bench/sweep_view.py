"""A sweep as a plot with logarithmic axes: a PNG, or a self-contained page that also has the figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from validate import plots
from validate.bench.machine import BUSY
from validate.bench.sweep import Sweep
from validate.html import page
from validate.plots import DARK, LIGHT, Theme, data_uri, new_plot
from wan22.errors import UserError

SIZE_INCHES = (7.2, 4.2)
ENDINGS = (".png", ".html")
COLOURS = ("#2563c9", "#d9730d", "#1a8754", "#9333ea", "#b4232f", "#5b6472")


def check_plot(path: Path) -> None:
    """Raise UserError unless the name ends in .png or .html."""
    if path.suffix not in ENDINGS:
        raise UserError(f"plot {path}", "a name ending in .png or .html", "rename it")


def write_plot(sweep: Sweep, path: Path) -> None:
    content = as_html(sweep).encode() if path.suffix == ".html" else png(sweep, LIGHT, transparent=False)
    path.write_bytes(content)


def png(sweep: Sweep, theme: Theme, *, transparent: bool = True) -> bytes:
    """Plot the points and the fitted line of every series."""
    figure, axes = new_plot(SIZE_INCHES, theme, label_points=9)
    exponents = sweep.exponents()
    for name, colour in zip(sweep.series, COLOURS * len(sweep.series), strict=False):
        _draw(axes, sweep, name, colour, exponents.get(name))
    _label(axes, sweep, theme)
    return plots.png(figure, transparent=transparent)


def _draw(axes: Any, sweep: Sweep, name: str, colour: str, exponent: float | None) -> None:
    x = [point.x for point in sweep.points]
    label = name if exponent is None else f"{name}: {sweep.grows_with(name)} to the {exponent:.2f}"
    axes.plot(x, [point.seconds[name] for point in sweep.points], "o", color=colour, label=label, markersize=5)
    if exponent is not None:
        fitted = sweep.fit(name)[1] * np.array(sweep.amounts(name), np.float64) ** exponent
        order = np.argsort(x)
        axes.plot(np.array(x)[order], fitted[order], color=colour, linewidth=1.2, alpha=0.7)


def _label(axes: Any, sweep: Sweep, theme: Theme) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    labels = [point.label if sweep.axis == "steps" else f"{point.x:,}\n{point.label}" for point in sweep.points]
    axes.set_xticks([point.x for point in sweep.points], labels)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(sweep.unit if sweep.axis == "steps" else f"{sweep.unit}, {sweep.axis}", color=theme.text)
    axes.set_ylabel("seconds", color=theme.text)
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9)


def as_html(sweep: Sweep) -> str:
    pictures = {name: data_uri(png(sweep, theme)) for name, theme in (("light", LIGHT), ("dark", DARK))}
    shown = {"sweep": sweep, "exponents": sweep.exponents(), "plots": pictures, "remarks": list(_remarks(sweep))}
    return page("sweep.html.j2", shown)


def _remarks(sweep: Sweep) -> Iterator[str]:
    """Yield the reasons not to trust the timings."""
    yield from sweep.faults
    if sweep.conditions.get("load_average", [0.0])[0] > BUSY * sweep.machine.get("cores", 1):
        yield "the machine was busy, which slows the sides unequally: measure again on an idle one"


def as_text(sweep: Sweep) -> Iterator[RenderableType]:
    """Yield the output for a terminal."""
    yield as_table(sweep)
    for remark in _remarks(sweep):
        yield Text(remark, "red" if remark in sweep.faults else "yellow")


def as_table(sweep: Sweep) -> Table:
    """The points and exponents as a table."""
    title = f"{sweep.model} {sweep.precision}: seconds by {sweep.axis}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in (sweep.axis, *([] if sweep.axis == "steps" else ["tokens"]), *sweep.series):
        table.add_column(heading, justify="right")
    for point in sweep.points:
        tokens = [] if sweep.axis == "steps" else [f"{point.x:,}"]
        table.add_row(point.label, *tokens, *(f"{point.seconds[name]:.4g}" for name in sweep.series))
    if exponents := sweep.exponents():
        blank = [] if sweep.axis == "steps" else [""]
        cells = [f"{exponents[name]:.2f}" if name in exponents else "" for name in sweep.series]
        table.add_row("exponent", *blank, *cells)
        table.add_row("of", *blank, *(sweep.grows_with(name) if name in exponents else "" for name in sweep.series))
    return table
