"""Options that several subcommands share, and the reading of what users type into them."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError

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
Schedule = Annotated[Literal["official", "diffusers"], typer.Option(help="Whose list of timesteps.")]

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
OneExpert = Annotated[bool, typer.Option("--one-expert", help="Keep one expert in memory at a time.")]

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
