"""The pictures of the report, as PNG data URIs: a plot of the drift per step, and frames side by side.

Plots have a light and a dark version with a transparent background. matplotlib is used without pyplot, so there is no
global state and no display.
"""

import base64
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from validate.ladder.row import Row
from validate.reference.parts import F32

Pixels = NDArray[np.uint8]  # [H, W, 3]

FILMSTRIP_FRAMES = 6
THUMBNAIL_WIDTH = 320
WORST_FRAME_WIDTH = 640
PLOT_DPI = 200
PLOT_SIZES_INCHES = {"wide": (7.2, 3.2), "narrow": (4.0, 3.0)}
FLOOR = 1e-9  # drawn instead of zero, which a logarithmic axis cannot show


@dataclass(frozen=True)
class Theme:
    text: str
    grid: str
    line: str
    reference: str  # the reference in our precision
    limit: str
    failed: str


LIGHT = Theme("#3d4451", "#d9dde5", line="#2563c9", reference="#b06a00", limit="#b4232f", failed="#b4232f")
DARK = Theme("#b8c0cf", "#333b4a", line="#7aa8f8", reference="#e0a43c", limit="#f2777f", failed="#f2777f")


@dataclass(frozen=True)
class Picture:
    """A frame as data URIs: ours, the reference's and their difference."""

    number: int  # from 1
    ours: str
    reference: str
    difference: str


@dataclass(frozen=True)
class Filmstrip:
    pictures: tuple[Picture, ...]
    amplification: float  # of the difference; 0 for equal videos


def drift_plot(steps: list[Row], theme: Theme, size_inches: tuple[float, float]) -> str:
    """Plot the relative L2 distance of the latents after every step, logarithmic; returns a PNG data URI."""
    figure, axes = new_plot(size_inches, theme)
    axes.set_xlabel("step", color=theme.text, fontsize=10)
    limit, numbers = steps[0].limit.value, [row.step or 0 for row in steps]
    curves = _curves(steps, theme)
    for label, (drift, colour, marker) in curves.items():
        axes.plot(numbers, drift, color=colour, linewidth=1.8, marker=marker, markersize=4.5, zorder=3, label=label)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=10, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    _scale(axes, [value for drift, *_ in curves.values() for value in drift], limit, len(steps))
    axes.axhline(limit, color=theme.limit, linewidth=1.4, linestyle=(0, (5, 3)))
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"limit {limit:g}", (0, limit), (4, 4), **where, color=theme.limit, fontsize=10)
    _switch(axes, steps, theme)
    _failures(axes, steps, theme)
    return data_uri(png(figure))


def new_plot(size_inches: tuple[float, float], theme: Theme, label_points: float = 10) -> tuple[Any, Any]:
    """A figure and its axes, with a logarithmic y axis and horizontal grid lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.text, which="both", length=0, labelsize=label_points)
    return figure, axes


def png(figure: Any, *, transparent: bool = True) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=PLOT_DPI, transparent=transparent)
    return stream.getvalue()


def in_all_themes(plot: Callable[[Theme, tuple[float, float]], str]) -> dict[str, str]:
    """Call ``plot`` for wide and narrow, light and dark pages: "wide_light" → data URI."""
    return {
        f"{width}_{shade}": plot(theme, size)
        for width, size in PLOT_SIZES_INCHES.items()
        for shade, theme in (("light", LIGHT), ("dark", DARK))
    }


def _curves(steps: list[Row], theme: Theme) -> dict[str, tuple[list[float], str, str]]:
    """Drift, colour and marker by name. NaN is kept and leaves a gap in the line."""
    found = {"ours": ([max(row.metrics.relative_l2, FLOOR) for row in steps], theme.line, "o")}
    low = [row.in_precision for row in steps if row.in_precision is not None]
    if len(low) == len(steps):
        drift = [max(its.alone.relative_l2, FLOOR) for its in low]
        found[f"PyTorch in {low[0].precision}"] = (drift, theme.reference, "s")
    return found


def _scale(axes: Any, drift: list[float], limit: float, steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    finite = [value for value in (*drift, limit) if math.isfinite(value)]
    axes.set_ylim(min(finite) / 8, max(finite) * 6)
    axes.set_xlim(0.5, steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))


def _failures(axes: Any, steps: list[Row], theme: Theme) -> None:
    """Mark failed steps with crosses, at the upper edge if the value is not finite."""
    top = axes.get_ylim()[1]
    for row in steps:
        if not row.passed:
            drift = row.metrics.relative_l2
            place = max(drift, FLOOR) if math.isfinite(drift) else top
            axes.plot([row.step], [place], "X", color=theme.failed, markersize=9, zorder=4, clip_on=False)


def _switch(axes: Any, steps: list[Row], theme: Theme) -> None:
    """Draw a vertical line at the switch of experts, with their names on its sides."""
    for before, after in itertools.pairwise(steps):
        if before.component != after.component:
            place = (before.step or 0) + 0.5
            axes.axvline(place, color=theme.text, linewidth=1, linestyle=":")
            for name, side, offset in ((before.component, "right", -6), (after.component, "left", 6)):
                axes.annotate(
                    name, (place, 0), (offset, 6), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha=side, color=theme.text, fontsize=10,
                )  # fmt: skip


def filmstrip(ours: F32, reference: F32) -> Filmstrip:
    """Evenly spaced frames of two videos ``[1, 3, F, H, W]`` in [-1, 1], and their amplified difference."""
    frames = reference.shape[2]
    chosen = sorted({round(i) for i in np.linspace(0, frames - 1, min(frames, FILMSTRIP_FRAMES))})
    amplification = _amplification(ours, reference)
    pictures = tuple(frame_picture(ours, reference, index, amplification, THUMBNAIL_WIDTH) for index in chosen)
    return Filmstrip(pictures, amplification)


def frame_picture(
    ours: F32, reference: F32, index: int, amplification: float, width: int = WORST_FRAME_WIDTH
) -> Picture:
    """Frame ``index`` (from 0) of both videos and their difference, each at most ``width`` wide."""
    sides = (ours[0, :, index], reference[0, :, index])
    shown = (*map(to_pixels, sides), _difference(*sides, amplification))
    return Picture(index + 1, *(_scale_down(pixels, width) for pixels in shown))


def to_pixels(frame: F32) -> Pixels:
    """8-bit pixels ``[H, W, 3]`` of a frame ``[3, H, W]``, truncated (wan22.md §7); NaN is black."""
    shade = np.nan_to_num((np.clip(frame, -1, 1) + 1) / 2)
    return np.moveaxis((shade * 255).astype(np.uint8), 0, -1)


def _amplification(ours: F32, reference: F32) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that brings the largest difference to full brightness."""
    largest = float(np.nan_to_num(np.abs(ours - reference), nan=2.0, posinf=2.0).max())
    if largest == 0:
        return 0.0
    room = max(1.0, 2 / largest)
    power = 10.0 ** math.floor(math.log10(room))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= room)


def _difference(ours: F32, reference: F32, amplification: float) -> Pixels:
    error = np.nan_to_num(np.abs(ours - reference), nan=2.0, posinf=2.0) * max(amplification, 1.0)
    return to_pixels(np.clip(error, 0, 2).astype(np.float32) - 1)


def _scale_down(pixels: Pixels, width: int) -> str:
    image = Image.fromarray(pixels)
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return data_uri(stream.getvalue())


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
