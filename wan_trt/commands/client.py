"""``wan-trt client``: a prompt to a running server → video."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wan22.errors import UserError
from wan_trt.arguments import Frames, Size, size_of
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from triton_repo.client import Result


def run(
    url: Annotated[str, typer.Argument(help="Host and gRPC port of the server.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What the video shows, in any language.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4, or .png or .jpg for one frame.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid; the official one unless given.")] = None,
    size: Size = None,
    frames: Frames = None,
    image: Annotated[Path | None, typer.Option(help="Image to start from (I2V, TI2V): JPEG, PNG or WebP.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="Image to end with (I2V).")] = None,
    fit: Annotated[str | None, typer.Option(help="official or crop.")] = None,
    preset: Annotated[str | None, typer.Option(help="lightning: 4 Euler steps without guidance.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Drawn by the server unless given.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    shift: Annotated[float | None, typer.Option(help="Bend of the noise schedule.")] = None,
    guidance_high_noise: Annotated[float | None, typer.Option(help="Guidance scale of this expert.")] = None,
    guidance_low_noise: Annotated[float | None, typer.Option(help="Guidance scale of this expert.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of all experts.")] = None,
    solver: Annotated[str | None, typer.Option(help="unipc unless given.")] = None,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds after which to give up.")] = math.inf,
    urgent: Annotated[bool, typer.Option("--urgent", help="Go before jobs that are not.")] = False,
    preview: Annotated[Path | None, typer.Option(help="JPEG to keep up to date while the video is made.")] = None,
    model: Annotated[str, typer.Option(help="The name it is served under.")] = "wan22",
) -> None:
    """Generate a video on a server. What is not given is the model's default; Ctrl-C cancels the job."""
    from runtime.video import check_destination
    from triton_repo.client import JobError, WanClient

    check_destination(output, frames or 1)
    width, height = size_of(size) or (None, None)
    settings = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "fps": fps,
        "last_image": _read(last_image),
        "fit": fit,
        "preset": preset,
        "steps": steps,
        "seed": seed,
        "shift": shift,
        "guidance": guidance,
        "guidance_high_noise": guidance_high_noise,
        "guidance_low_noise": guidance_low_noise,
        "solver": solver,
        "output_format": _format(output),
        "preview": preview is not None,
    }
    priority: Literal[1, 2] = 1 if urgent else 2
    with WanClient(url, model) as client, bars() as progress:

        def show(event: dict[str, object]) -> None:
            if event["phase"] in ("denoise", "decode"):
                progress(str(event["phase"]), int(str(event["step"])), int(str(event["total"])))
            if preview is not None and event["preview"]:
                preview.write_bytes(bytes(event["preview"]))  # type: ignore[call-overload]

        try:
            result = client.generate(
                prompt, image=image, on_progress=show, deadline_s=deadline, priority=priority, **settings
            )
        except JobError as error:
            raise error.as_user_error() from None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(result.video)
    console.print(f"{output}: {_told(result)}")


def _told(result: "Result") -> str:
    event = result.event
    return f"{event['width']}x{event['height']}, {event['frames']} frames at {event['fps']} fps, seed {event['seed']}"


def _format(output: Path) -> str:
    formats = {".mp4": "mp4", ".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}
    if output.suffix.lower() not in formats:
        raise UserError(str(output), "a name ending in .mp4, .png or .jpg", "rename the output")
    return formats[output.suffix.lower()]


def _read(image: Path | None) -> bytes | None:
    from triton_repo.client import content_of

    return content_of(image)
