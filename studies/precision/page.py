"""The study as two files: ``study.json`` for programs, ``study.html`` for people, which stands alone."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from studies.precision.result import COLLAPSE, Study
from validate.files import write_files
from validate.plots import LIGHT, Theme, data_uri, new_plot, plots_for_pages, png_of, style_axes
from validate.report.to_html import TEMPLATES
from wan22.page import render

TEMPLATE = Path(__file__).parent / "templates" / "study.html.j2"
COLOURS = (
    "#2563c9", "#0f8b8d", "#c77700", "#8b5cf6", "#b4232f", "#6b7280",
    "#db2777", "#6b8e23", "#7c5c46", "#334155", "#be185d",
)  # fmt: skip
COLOURS_DARK = (
    "#7aa8f8", "#4fd1c5", "#f6b04a", "#b79cff", "#f2777f", "#a3acba",
    "#f490c2", "#b5d36b", "#d0a88c", "#cbd5e1", "#fda4af",
)  # fmt: skip


def write_study(study: Study, folder: Path) -> None:
    """Writes both files into ``folder``, over those of an earlier study."""
    write_files(folder, {"study.json": study.as_json(), "study.html": as_html(study).encode()})


def as_html(study: Study) -> str:
    values = {"study": study, "plots": plots_for_pages(partial(error_plot, study)), "collapse": COLLAPSE}
    return render(TEMPLATE, values, shared=TEMPLATES)


def error_plot(study: Study, theme: Theme, size_inches: tuple[float, float]) -> str:
    """Every variant's velocity error over the steps, logarithmic, as a PNG data URI."""
    figure, axes = new_plot(size_inches)
    colours = itertools.cycle(COLOURS if theme is LIGHT else COLOURS_DARK)
    for result, colour in zip(study.results, colours, strict=False):
        steps, percent = range(1, len(result.errors) + 1), [100 * error for error in result.errors]
        style = "--" if result.variant.ablation else "-"
        axes.plot(steps, percent, style, color=colour, marker="o", markersize=4, label=result.variant.name)
    _set_scales(axes, len(study.timesteps))
    style_axes(axes, theme, "step")
    legend = figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return data_uri(png_of(figure))


def _set_scales(axes: Any, steps: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_xlim(0.7, steps + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
