"""The study as two files: ``study.json`` for programs, ``study.html`` for people, which stands alone."""

import io
import itertools
from typing import Any

from validate.plots import DARK, LIGHT, PLOT_DPI, Theme, data_uri
from validate.report.to_html import PLOT_SIZES_INCHES, TEMPLATES
from validate.study.result import COLLAPSE, Study
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
    """Writes both files beside the claimed ``study.json``, over those of an earlier study."""
    write_files(claimed, {"study.json": study.as_json, "study.html": lambda: as_html(study).encode()})


def as_html(study: Study) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {
        f"{page}_{shade}": error_plot(study, theme, size)
        for page, size in PLOT_SIZES_INCHES.items()
        for shade, theme in (("light", LIGHT), ("dark", DARK))
    }
    return environment.get_template("study.html.j2").render(study=study, plots=plots, collapse=COLLAPSE)


def error_plot(study: Study, theme: Theme, size_inches: tuple[float, float]) -> str:
    """Every variant's velocity error over the steps, logarithmic, as a PNG data URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    axes = figure.add_subplot()
    colours = itertools.cycle(COLOURS if theme is LIGHT else COLOURS_DARK)
    for result, colour in zip(study.results, colours, strict=False):
        steps, percent = range(1, len(result.errors) + 1), [100 * error for error in result.errors]
        style = "--" if result.variant.ablation else "-"
        axes.plot(steps, percent, style, color=colour, marker="o", markersize=4, label=result.variant.name)
    _style(axes, theme, len(study.timesteps))
    legend = figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.text)
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(stream, format="png", dpi=PLOT_DPI, transparent=True)
    return data_uri(stream.getvalue())


def _style(axes: Any, theme: Theme, steps: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_xlim(0.7, steps + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.text, which="both", length=0, labelsize=10)
    axes.set_xlabel("step", color=theme.text, fontsize=10)
