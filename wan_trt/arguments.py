"""Options that several subcommands share, and the reading of what users type into them."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from wan22.errors import UserError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of the same kind.")]
Size = Annotated[str | None, typer.Option("--size", help="Width x height in pixels, such as 832x480.")]
Frames = Annotated[int | None, typer.Option("--frames", help="Video frames, a multiple of 4 plus 1.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="The noise torch.Generator makes of it.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid; the official one unless given.")]
Image = Annotated[Path | None, typer.Option(help="Image to start from (I2V, TI2V): JPEG, PNG or WebP.")]
LastImage = Annotated[Path | None, typer.Option(help="Image to end with (I2V).")]
Fit = Annotated[Literal["official", "crop"], typer.Option(help="Keep the image's shape, or crop it to exactly --size.")]
ExactOfficial = Annotated[
    bool, typer.Option("--exact-official", help="Round sizes as the official code does, float errors included.")
]
Preset = Annotated[str | None, typer.Option(help="lightning: 4 Euler steps without guidance.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Shift = Annotated[float | None, typer.Option(help="Bend of the noise schedule.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of all experts.")]
ExpertGuidance = Annotated[
    float | None, typer.Option(help="Guidance scale of this expert; 1 skips the unconditional pass.")
]
Solver = Annotated[Literal["unipc", "dpm++", "euler"] | None, typer.Option(help="unipc unless given.")]
ReferenceDevice = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where PyTorch computes; auto: on the GPU if engines do.")
]
Gate = Annotated[Path | None, typer.Option(help="TOML of thresholds; exit code 1 when one is missed.")]
ListGates = Annotated[bool, typer.Option("--list-gates", help="Only print what a gate may name.")]
Residency = Annotated[
    Literal["all", "one-expert", "one-component", "auto"],
    typer.Option(help="Engines that stay loaded; auto: as many as fit into the free memory."),
]
Schedule = Annotated[Literal["official", "diffusers"], typer.Option(help="Whose list of timesteps.")]

SEEDS_AT_MOST = 1000


def size_of(text: str | None) -> tuple[int, int] | None:
    """``"832x480"`` → (832, 480)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[x×*](\d{1,5})", text.strip())
    if not match:
        raise UserError(f"size {text!r}", "width x height in pixels", "write it as 832x480")
    return int(match[1]), int(match[2])


def numbers_of(text: str) -> frozenset[int]:
    """``"0-2,39"`` → {0, 1, 2, 39}."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        if not match:
            raise UserError(f"blocks {text!r}", "numbers and ranges", "write them as 0-2,39")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"blocks {text!r}", "ranges that go up", f"write {last}-{first}")
        numbers |= set(range(first, last + 1))
    return frozenset(numbers)


def seeds_of(text: str | None) -> tuple[int, ...]:
    """``"0,10-12"`` → (0, 10, 11, 12)."""
    seeds: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip())
        last = int(match[2] or match[1]) if match else 0
        if not match or not int(match[1]) <= last < min(int(match[1]) + SEEDS_AT_MOST, 2**64):
            raise UserError(
                f"seeds {text!r}", f"numbers and ranges of at most {SEEDS_AT_MOST}", "write them as 0,1,10-12"
            )
        seeds.extend(range(int(match[1]), last + 1))
    return tuple(seeds)


def by_expert(high_noise: float | None, low_noise: float | None) -> dict[str, float]:
    """The guidance scales that were given, by expert."""
    scales = {"high_noise": high_noise, "low_noise": low_noise}
    return {name: value for name, value in scales.items() if value is not None}
