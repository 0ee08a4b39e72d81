"""The options that put cinematic terms in front of a prompt, shared by several subcommands."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from wan22.looks import OPTIONS as PICKERS
from wan22.looks import spelled

HELP = {
    "style": "Medium or effect, as 'Claymation'.",
    "time": "Time of day, as 'Dusk time'.",
    "light": "Light source, intensity or direction, as 'Edge lighting'.",
    "tone": "Colors, contrast or saturation, as 'Warm colors'.",
    "shot": "Size of the subject, as 'Close-up shot'.",
    "composition": "Place of the subject, as 'Center composition'.",
    "lens": "Focal length, as 'Long lens shot'.",
    "angle": "Camera angle, as 'Low angle shot'.",
    "movement": "Camera movement, as 'Camera pans left'.",
}
OPTIONS = {
    "look": Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Named set of terms; wan-trt looks lists all.")
    ],
    **{name: Annotated[list[str] | None, typer.Option(metavar="TERM", help=HELP[name])] for name in PICKERS},
}


def terms_from(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The looks and terms of a command's options. Raises UserError for one that the option does not have."""
    return tuple(spelled(name, option) for option in OPTIONS for name in options.get(option) or ())
