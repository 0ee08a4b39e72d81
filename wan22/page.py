"""Pages from Jinja templates. The package jinja2 is imported when one is made."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(
    template: Path,
    values: Mapping[str, Any],
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    shared: Path | None = None,
) -> str:
    """The HTML that ``template`` makes of ``values``: values are escaped, and a name that has none is an error.

    Args:
        template: a file; it may include others of its folder.
        values: by the names that the template uses.
        filters: more filters, by name.
        shared: a second folder to include from.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, *([shared] if shared else [])]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template.name).render(values)
