"""The report as a page that stands alone: no network, no script, pictures inside; for phones, light and dark."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from validate.figures import DARK, LIGHT, drift_plot
from validate.row import Row
from validate.wording import Line, line

if TYPE_CHECKING:
    from validate.report import ValidationReport

TEMPLATES = Path(__file__).parent / "templates"
STEPS_SHOWN_OPEN = 12
PLOT_SIZES_INCHES = {"wide": (7.2, 3.2), "narrow": (4.0, 3.0)}


def as_html(report: "ValidationReport") -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report, sections=sections(report), plots=_plots(report.steps)
    )


def _plots(steps: list[Row]) -> dict[str, str]:
    """The drift for wide and narrow, light and dark pages; nothing when there was no run."""
    return {
        f"{page}_{shade}": drift_plot(steps, theme, size)
        for page, size in PLOT_SIZES_INCHES.items()
        for shade, theme in (("light", LIGHT), ("dark", DARK))
        if steps
    }


@dataclass(frozen=True)
class Section:
    title: str
    rows: tuple[Line, ...]
    passed: int
    open: bool


def sections(report: "ValidationReport") -> list[Section]:
    """The rows in their order, cut where the subject changes."""
    result = []
    for title, group in groupby(report.rows, section_title):
        rows = tuple(group)
        passed = sum(row.passed for row in rows)
        shown = passed < len(rows) or len(rows) <= STEPS_SHOWN_OPEN
        result.append(Section(title, tuple(map(line, rows)), passed, shown))
    return result


def section_title(row: Row) -> str:
    if row.subject.startswith("official"):
        return "Official code"
    if row.step is not None:
        return "Latents, step by step"
    fixed = {"tokenizer": "Text", "text_encoder": "Text", "sampler": "Schedule and noise", "video": "Video"}
    if row.component == "image" or row.component.startswith("vae_encoder"):
        return "Image"
    if row.component.startswith("vae_"):
        return "VAE"
    return fixed.get(row.component, f"Transformer, {row.component}")
