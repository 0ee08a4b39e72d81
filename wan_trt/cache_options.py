"""The options of the step cache, shared by several subcommands."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError, shortened
from wan_trt.console import console

if TYPE_CHECKING:
    from wan22.caching import Caching

Cache = Annotated[
    Literal["easy"] | None,
    typer.Option(metavar="easy", help="Skip steps whose velocity EasyCache expects to change little."),
]
CacheThreshold = Annotated[float | None, typer.Option(help="Expected change up to which easy skips; by default 0.05.")]
FirstExact = Annotated[int | None, typer.Option(help="Steps that easy computes at the start; by default 10.")]
LastExact = Annotated[int | None, typer.Option(help="Steps that easy computes at the end; by default 2.")]
MaxConsecutive = Annotated[int | None, typer.Option(help="Steps that easy skips in a row; by default 2.")]
SkipSteps = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Skip these steps, from 0: 11,12,14; magcache; or a file with a list, or a video that repeats its own.",
    ),
]
CacheReuse = Annotated[
    Literal["rescale", "hold", "taylor1"] | None,
    typer.Option("--reuse", metavar="HOW", help="Velocity of a skipped step: rescale (default), hold or taylor1."),
]
LateCfg = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Extrapolate the guidance of these late steps: 24,26,28 or auto."),
]

LIST_MOST_BYTES = 64 * 1024

OPTIONS = {
    "cache": Cache, "cache_threshold": CacheThreshold, "first_exact": FirstExact, "last_exact": LastExact,
    "max_consecutive": MaxConsecutive, "skip_steps": SkipSteps, "reuse": CacheReuse, "late_cfg": LateCfg,
}  # fmt: skip


def caching_from(options: Mapping[str, Any]) -> "Caching | None":
    """The step cache from a command's options; None without one.

    Raises:
        UserError: options exclude each other, have nothing to act on, or a list cannot be read.
    """
    from wan22.caching import Caching, parse_steps

    easy, skip_steps, late_cfg = options["cache"] == "easy", options["skip_steps"], options["late_cfg"]
    if easy and skip_steps is not None:
        raise UserError("--cache easy with --skip-steps", "one of them", "leave the other out")
    of_easy = ("cache_threshold", "first_exact", "last_exact", "max_consecutive")
    typed = {name.removeprefix("cache_"): options[name] for name in of_easy if options[name] is not None}
    if typed and not easy:
        found = next(f"--{name.replace('_', '-')}" for name in of_easy if options[name] is not None)
        raise UserError(f"{found} without --cache easy", "--cache easy beside it", "add it")
    if (reuse := options["reuse"]) is not None and not easy and skip_steps is None:
        raise UserError("--reuse without skipped steps", "--cache easy or --skip-steps beside it", "add one of them")
    late = late_cfg if late_cfg in (None, "auto") else parse_steps("--late-cfg", late_cfg)
    caching = Caching(
        easy,
        **typed,
        skip_steps=_skip_steps(skip_steps, options.get("engines")),
        reuse=reuse or "rescale",
        late_cfg=late,
    )
    return caching if caching.is_on else None


def skip_steps_file(text: str | None) -> Path | None:
    """The file that --skip-steps names, which no output may replace; None for a list, magcache or nothing."""
    return None if text is None or text == "magcache" or re.fullmatch(r"[-\d,\s]*", text) else Path(text)


def _skip_steps(text: str | None, engines: Path | None) -> 'tuple[int, ...] | Literal["magcache"] | None':
    """The steps in ``text``, in the file that it names, or in the metadata of that video."""
    from wan22.caching import parse_steps
    from wan22.inputs import read_small

    if text is None or text == "magcache":
        return None if text is None else "magcache"
    if (path := skip_steps_file(text)) is None:
        return parse_steps("--skip-steps", text)
    if path.suffix.lower() in (".mp4", ".webm", ".png"):
        return _steps_of_video(path, engines)
    try:
        lines = read_small(path, LIST_MOST_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        expected = "a list such as 11,12,14, magcache, or a file with a list"
        raise UserError(f"--skip-steps {shortened(text)}: {reason}", expected, "name one of them") from None
    words = ",".join(line.partition("#")[0].strip().strip(",") for line in lines).split(",")
    return parse_steps(f"{path}:", ",".join(word for word in words if word.strip()))


def _steps_of_video(video: Path, engines: Path | None) -> tuple[int, ...]:
    from runtime.recipe import read_recipe
    from wan22.bundle import kind_of, read_manifest

    recipe = read_recipe(video)
    if recipe.cache is None or not isinstance(recipe.cache.skip_steps, tuple):
        raise UserError(f"{video} was made without skipping steps", "a video made with a step cache", "name another")
    model = recipe.model if engines is None else read_manifest(engines, kind_of(engines)).spec.name
    if model != recipe.model:
        raise UserError(f"{video} was made by {recipe.model}", f"a video of {model}", "its skipped steps do not apply")
    return recipe.cache.skip_steps


def print_decisions(skipped: Sequence[int], late: Sequence[int], steps: int) -> None:
    """Print the lists that repeat the decisions of a step cache."""
    for what, found, option in (("skipped", skipped, "--skip-steps"), ("late cfg in", late, "--late-cfg")):
        if found:
            console.print(f"{what} {len(found)} of {steps} steps: {option} {','.join(map(str, found))}")
    if not skipped and not late:
        console.print("the step cache skipped nothing")
