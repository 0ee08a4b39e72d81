"""Read prompt files, used for calibration."""

import json
from dataclasses import dataclass
from pathlib import Path

from wan22.errors import UserError
from wan22.inputs import check_regular
from wan22.specs import ImageUse


@dataclass(frozen=True)
class Prompt:
    text: str
    image: Path | None = None


def read_prompts(path: Path, image_use: ImageUse) -> list[Prompt]:
    """One prompt per line, as text or as JSON: ``{"prompt": "A cat", "image": "cat.jpg"}``.

    Paths of images are relative to the file. Empty lines are ignored, and so are comments, which begin with ``#`` and a
    blank; ``#cinematic`` begins a prompt. A prompt that begins like a comment is written as JSON. ``image_use`` says
    whether the model takes images.

    Raises:
        UserError: the file is missing or has no prompts, a JSON line has no prompt or an empty one, or an image is
            missing or not supported.
    """
    check_regular(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: {reason}", "a text file", "write one prompt per line") from None
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line and line.split()[0] != "#"]
    if not prompts:
        raise UserError(f"{path} has no prompts", "at least one", "write one prompt per line")
    for prompt in prompts:
        if image_use == "required" and prompt.image is None:
            expected = 'lines such as {"prompt": "A cat", "image": "cat.jpg"}'
            raise UserError(f"{path}: no image for {prompt.text!r}", expected, "add an image to every prompt")
        if image_use == "no" and prompt.image is not None:
            raise UserError(f"{path}: an image for {prompt.text!r}", "text only", "remove the image")
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(line)
    try:
        entry = json.loads(line)
        text, image = entry["prompt"], entry.get("image")
        prompt = Prompt(text, None if image is None else path.parent / image)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{path}, line {number}: {type(error).__name__} {error}"
        raise UserError(found, '{"prompt": ..., "image": ...}', "correct the line") from None
    if not isinstance(text, str) or not text.strip():
        remedy = 'describe a video; only --negative-prompt may be ""'
        raise UserError(f"{path}, line {number}: prompt {text!r}", "some text", remedy)
    return prompt
