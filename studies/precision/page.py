"""The study as two files: ``study.json`` for programs, the self-contained ``study.html`` for people."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from studies.precision.result import COLLAPSE, Study
from validate.html import page
from validate.plots import LIGHT, Theme, data_uri, in_all_themes, new_plot, png
from wan22.files import Claim, write_files

COLOURS = (
    "#2563c9", "#0f8b8d", "#c77700", "#8b5cf6", "#b4232f", "#6b7280",
    "#db2777", "#6b8e23", "#7c5c46", "#334155", "#be185d",
)  # fmt: skip
COLOURS_DARK = (
    "#7aa8f8", "#4fd1c5", "#f6b04a", "#b79cff", "#f2777f", "#a3acba",
    "#f490c2", "#b5d36b", "#d0a88c", "#cbd5e1", "#fda4af",
)  # fmt: skip


def write_study(study: Study, claimed: Claim) -> None:
    """Write both files into the folder of ``claimed``, replacing those of an earlier study."""
    write_files(claimed, {"study.json": study.as_json, "study.html": lambda: as_html(study).encode()})


def as_html(study: Study) -> str:
    plots = in_all_themes(partial(error_plot, study))
    shown = {"study": study, "plots": plots, "collapse": COLLAPSE}
    return page("study.html.j2", shown, folder=Path(__file__).parent / "templates")


def error_plot(study: Study, theme: Theme, size_inches: tuple[float, float]) -> str:
    """Plot every variant's velocity error over the steps, logarithmic; returns a PNG data URI."""
    figure, axes = new_plot(size_inches, theme)
    colours = itertools.cycle(COLOURS if theme is LIGHT else COLOURS_DARK)
    for result, colour in zip(study.results, colours, strict=False):
        steps, percent = range(1, len(result.errors) + 1), [100 * error for error in result.errors]
        style = "--" if result.variant.ablation else "-"
        axes.plot(steps, percent, style, color=colour, marker="o", markersize=4, label=result.variant.name)
    _scale(axes, theme, len(study.timesteps))
    legend = figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return data_uri(png(figure))


def _scale(axes: Any, theme: Theme, steps: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_xlim(0.7, steps + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step", color=theme.text, fontsize=10)
