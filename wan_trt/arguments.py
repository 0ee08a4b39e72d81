"""Options that several subcommands share, and the reading of what users type into them."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.shapes import parse_size

if TYPE_CHECKING:
    from runtime.request import Request

Engines = Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="What the video shows, in any language.", show_default=False)]
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
Preset = Annotated[str | None, typer.Option(help="Settings by name; wan-trt presets lists them.")]
Boundary = Annotated[
    float | None, typer.Option(help="Share of the timesteps above which the high-noise expert works, such as 0.875.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Shift = Annotated[float | None, typer.Option(help="Bend of the noise schedule.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of all experts.")]
ExpertGuidance = Annotated[
    float | None, typer.Option(help="Guidance scale of this expert; 1 skips the unconditional pass.")
]
Solver = Annotated[
    Literal["unipc", "dpm++", "euler", "renoise"] | None, typer.Option(help="unipc unless given or preset.")
]
ReferenceDevice = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where PyTorch computes; auto: on the GPU if engines do.")
]
Gate = Annotated[Path | None, typer.Option(help="TOML of thresholds; exit code 1 when one is missed.")]
ListGates = Annotated[bool, typer.Option("--list-gates", help="Only print what a gate may name.")]
Residency = Annotated[
    Literal["all", "one-expert", "one-component", "auto"],
    typer.Option(help="Engines that stay loaded; auto: as many as fit into the free memory."),
]
Schedule = Annotated[
    Literal["official", "diffusers"] | None, typer.Option(help="Whose list of timesteps; official unless preset.")
]

# of a server
ServedName = Annotated[str, typer.Option("--name", help="Name to serve the model under.")]
Topology = Annotated[
    Literal["owner", "bls"], typer.Option(help="One model that owns the engines, or a model per engine.")
]
GpuMemory = Annotated[float | None, typer.Option(help="GiB of the GPU, for bls; the target's unless given.", min=0)]
Limit = Annotated[
    int | None, typer.Option(help="Largest request; sizes are the model's largest official one unless given.")
]
QueueSize = Annotated[int, typer.Option(help="Jobs that may wait, per priority.", min=1)]
LongestJob = Annotated[int, typer.Option(help="Seconds a job may run, and a shutdown waits.", min=1)]

RANGE_AT_MOST = 1000


def size_of(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels; None where nothing was typed."""
    return None if text is None else parse_size(text)


def blocks_of(text: str) -> frozenset[int]:
    """``"0-2,39"`` → {0, 1, 2, 39}."""
    return frozenset(_numbers("blocks", text, 999, "0-2,39")) if text else frozenset()


def seeds_of(text: str | None) -> tuple[int, ...]:
    """``"0,10-12"`` → (0, 10, 11, 12)."""
    return () if text is None else tuple(_numbers("seeds", text, 2**64 - 1, "0,1,10-12"))


def _numbers(what: str, text: str, most: int, example: str) -> list[int]:
    """Numbers up to ``most`` and ranges of them, in order; ``what`` and ``example`` are for the error."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, most + 1)
        if last < first:
            raise UserError(f"{what} {text!r}", "ranges that go up", f"write {last}-{first}")
        if last > most or last - first >= RANGE_AT_MOST:
            expected = f"numbers up to {most} and ranges of at most {RANGE_AT_MOST}"
            raise UserError(f"{what} {text!r}", expected, f"write them as {example}")
        numbers.extend(range(first, last + 1))
    return numbers


def request_from(options: Mapping[str, Any]) -> "Request":
    """The request in the options of a command, its ``locals()``: what :class:`Request` has under the option's name."""
    from runtime.request import Request

    names = {field.name for field in fields(Request)} & options.keys()
    by_expert = {name: options.get(f"guidance_{name}") for name in ("high_noise", "low_noise")}
    return Request(
        **{name: options[name] for name in names}
        | {
            "size": size_of(options["size"]),
            "guidance": {name: scale for name, scale in by_expert.items() if scale is not None},
            "guidance_scale": options.get("guidance"),
        }
    )


def limits_of(options: Mapping[str, Any]) -> dict[str, int | None]:
    """What no request may exceed, by the names of :class:`triton_repo.settings.Limits`; None: the model's own."""
    names = ("max_pixels", "max_frames", "max_steps", "max_prompt_bytes", "max_image_bytes")
    queue = {"max_queue_size": options["queue_size"], "longest_job_s": options["longest_job"]}
    return {name: options[name] for name in names} | queue
