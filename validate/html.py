"""Pages that stand alone, from templates."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def page(
    template: str,
    shown: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    beside: Path = TEMPLATES,
) -> str:
    """The page that ``template`` makes of ``shown``, everything in it escaped.

    It is looked for in the folder ``beside`` first; what it includes may lie in either.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([beside, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(shown)
