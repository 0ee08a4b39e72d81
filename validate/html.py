"""Self-contained HTML pages from templates."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def page(
    template: str,
    shown: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    folder: Path = TEMPLATES,
) -> str:
    """Render ``template`` with the variables ``shown``, which are escaped.

    Templates and their includes are looked up in ``folder``, then in ``TEMPLATES``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(shown)
