"""The cases of a validation: every prompt with every seed. The first case climbs the full ladder."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.prompts import read_prompts
from validate.options import ValidateOptions
from wan22.errors import UserError
from wan22.specs import ImageUse

OF_CASES = ("--prompts", "--seeds", "--prompt", "--seed", "--image", "--calls", "-o", "--output")


@dataclass(frozen=True)
class Case:
    """One run; ``options`` request this run only."""

    number: int  # from 1
    options: ValidateOptions

    @property
    def command(self) -> str:
        """The command that repeats this case alone, derived from the command of the validation."""
        request = self.options.request
        words = list(_without(shlex.split(self.options.command), OF_CASES))
        words += ["-o", f"case-{self.number}", "--seed", str(request.seed)]
        words += [] if request.prompt is None else ["--prompt", request.prompt]
        words += ["--image", str(request.image)] if isinstance(request.image, Path) else []
        return shlex.join(words)


def _without(words: list[str], options: tuple[str, ...]) -> Iterator[str]:
    """``words`` without ``options`` and their values."""
    rest = iter(words)
    for word in rest:
        if word in options:
            next(rest, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            yield word


def cases_of(options: ValidateOptions, image_use: ImageUse) -> list[Case]:
    """The cases that ``options`` request.

    Raises:
        UserError: options exclude each other, a seed occurs twice, or the file of prompts is invalid.
    """
    request = options.request
    if options.prompts is not None and (request.prompt is not None or request.image is not None):
        raise UserError("--prompts with --prompt or --image", "one of them", "write them into the file")
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {', '.join(map(str, options.seeds))}", "each seed once", "remove the duplicates")
    if options.seeds and request.seed:
        raise UserError(f"--seeds with --seed {request.seed}", "one of them", "omit --seed")
    if options.seeds and request.noise is not None:
        raise UserError("--seeds with --noise", "one of them", "omit --seeds")
    prompts: list[tuple[str | None, Path | bytes | None]] = [(request.prompt, request.image)]
    if options.prompts is not None:
        prompts = [(prompt.text, prompt.image) for prompt in read_prompts(options.prompts, image_use)]
    chosen = [
        replace(options, request=replace(request, prompt=text, image=image, seed=seed))
        for text, image in prompts
        for seed in options.seeds or (request.seed,)
    ]
    return [Case(number, its) for number, its in enumerate(chosen, 1)]
