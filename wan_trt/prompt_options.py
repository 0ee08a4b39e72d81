"""The options that change a prompt: cinematic terms in front of it, a language model that rewrites it."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.looks import OPTIONS as PICKERS
from wan22.looks import spelled
from wan_trt.console import console

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.request import Request

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
        list[str] | None,
        typer.Option(metavar="NAME", help="Named sets of terms, with commas between; wan-trt looks lists all."),
    ],
    **{name: Annotated[list[str] | None, typer.Option(metavar="TERM", help=HELP[name])] for name in PICKERS},
}


def terms_from(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The looks and terms of a command's options. Raises UserError for one that the option does not have."""
    return tuple(
        spelled(name.strip(), option)
        for option in OPTIONS
        for typed in options.get(option) or ()
        for name in typed.split(",")
    )


EXTENSION = {
    "extend": Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Let a language model rewrite the prompt: base URL of an OpenAI-compatible endpoint. Sends prompt and "
            "image there, with the key in WAN_TRT_EXTEND_KEY.",
        ),
    ],
    "extend_model": Annotated[str | None, typer.Option(metavar="NAME", help="Its model.")],
    "extend_language": Annotated[
        Literal["same", "en", "zh"] | None,
        typer.Option(metavar="same|en|zh", help="Language of the new prompt; by default the prompt's own."),
    ],
    "extend_required": Annotated[
        bool | None, typer.Option("--extend-required", help="Fail instead of going on with your own prompt.")
    ],
}


def extended_request(options: Mapping[str, Any], request: "Request", pipeline: "Pipeline") -> "Request":
    """``request`` with a prompt that the endpoint of ``--extend`` writes, or as it is, with a warning.

    Raises:
        UserError: other options of the extension without ``--extend``; no usable answer with ``--extend-required``.
    """
    given = {name: options[name] for name in EXTENSION if options.get(name)}
    if "extend" not in given:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names} without --extend", "the endpoint beside it", "add --extend URL")
        return request
    from runtime.extend import KEY_VARIABLE, Endpoint, NotExtendedError, extended

    key, model = os.environ.get(KEY_VARIABLE, ""), given.get("extend_model", "default")
    endpoint = Endpoint(given["extend"], model, given.get("extend_language", "same"), key)
    pipeline.complete(request)  # bad input is refused before anything leaves the machine
    try:
        request = extended(request, endpoint, lambda text: not pipeline.tokenizer.encode(text).truncated)
    except NotExtendedError as problem:
        if given.get("extend_required"):
            raise UserError(f"{endpoint.host}: {problem}", "a prompt", "leave --extend-required out") from None
        console.print(f"prompt not rewritten ({endpoint.host}: {problem}): your own is used")
    else:
        console.print(f"prompt by {request.extended_by}: {request.prompt}")
    return request
