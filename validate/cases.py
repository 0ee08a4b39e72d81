"""The runs that a validation compares: every prompt with every seed, the first of them on the whole ladder."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.prompts import read_prompts
from validate.options import ValidateOptions
from wan22.errors import UserError
from wan22.specs import Task

OF_CASES = ("--prompts", "--seeds", "--prompt", "--seed", "--image", "--calls", "-o", "--output")


@dataclass(frozen=True)
class Case:
    """``options`` ask for this run alone."""

    number: int  # from 1
    options: ValidateOptions

    @property
    def command(self) -> str:
        """What the user types to make this run alone, from what made all of them."""
        options = self.options
        words = list(_without(shlex.split(options.command), OF_CASES))
        words += ["-o", f"case-{self.number}", "--seed", str(options.seed)]
        words += [] if options.prompt is None else ["--prompt", options.prompt]
        words += ["--image", str(options.image)] if isinstance(options.image, Path) else []
        return shlex.join(words)


def _without(words: list[str], options: tuple[str, ...]) -> Iterator[str]:
    """``words`` without those options and their values."""
    rest = iter(words)
    for word in rest:
        if word in options:
            next(rest, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            yield word


def cases_of(options: ValidateOptions, task: Task) -> list[Case]:
    """Raises UserError for a prompt beside a file of them, a seed beside several or twice, or a file that is none."""
    if options.prompts is not None and (options.prompt is not None or options.image is not None):
        raise UserError("--prompts beside --prompt or --image", "one of them", "write them into the file")
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {', '.join(map(str, options.seeds))}", "every seed once", "leave the others out")
    if options.seeds and options.seed:
        raise UserError(f"--seeds beside --seed {options.seed}", "one of them", "leave --seed out")
    prompts: list[tuple[str | None, Path | bytes | None]] = [(options.prompt, options.image)]
    if options.prompts is not None:
        prompts = [(prompt.text, prompt.image) for prompt in read_prompts(options.prompts, task)]
    chosen = [
        replace(options, prompt=text, image=image, seed=seed)
        for text, image in prompts
        for seed in options.seeds or (options.seed,)
    ]
    return [Case(number, its) for number, its in enumerate(chosen, 1)]
