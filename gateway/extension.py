"""Prompts that the operator's language model rewrites before their jobs are queued; no GPU waits for it."""

from collections.abc import Mapping
from typing import Any

from gateway.api_error import invalid
from gateway.order import IMAGES, Order
from runtime.extend import Endpoint, NotExtendedError, extended
from runtime.request import Request
from wan22.specs import TEXT_TOKENS

ASCII_PER_TOKEN = 3  # fewer than the tokenizer, which the gateway lacks, makes of prose
LOOKS_BYTES = 512  # for terms in front


def wants_extension(values: Mapping[str, Any], endpoint: Endpoint | None) -> bool:
    """Whether the prompt is to be rewritten. Raises ApiError if there is nobody to do it."""
    wanted: bool = values.get("prompt_extend", False)
    if wanted and endpoint is None:
        raise invalid("prompt_extend", "prompt_extend | expected false: this gateway has no language model")
    return wanted


def with_extended_prompt(
    values: Mapping[str, Any], order: Order, endpoint: Endpoint, most_bytes: int
) -> dict[str, Any]:
    """``values`` of an ``order`` that can be made, with the prompt that ``endpoint`` writes; blocks while it does.

    Whatever goes wrong there, the own prompt stands, and ``extend_warning`` says why. ``most_bytes`` is the model's
    limit of prompts.
    """
    images = {name: order.images[sent_as] for name, sent_as in IMAGES.items() if sent_as in order.images}
    values = {**values, **images, "seed": order.echo["seed"]}  # nothing is drawn or fetched twice
    request = Request(values["prompt"], image=order.images.get("image"), seed=int(order.echo["seed"]))
    try:
        made = extended(request, endpoint, lambda text: _fits(text, most_bytes))
    except NotExtendedError as problem:
        return {**values, "extend_warning": f"{endpoint.host}: {problem}"}
    return {**values, "prompt": made.prompt, "written_prompt": made.written, "extended_by": made.extended_by}


def _fits(text: str, most_bytes: int) -> bool:
    ascii_characters = sum(character.isascii() for character in text)
    tokens = ascii_characters / ASCII_PER_TOKEN + len(text) - ascii_characters
    return tokens <= TEXT_TOKENS and len(text.encode()) + LOOKS_BYTES <= most_bytes
