"""``wan-trt client``: a prompt → video from a running server."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wan22.errors import UserError
from wan22.files import Claim, claim_file
from wan22.inputs import check_no_source
from wan22.progress import Progress
from wan22.quantities import video_text
from wan22.specs import TEXT_TOKENS
from wan_trt import arguments as given
from wan_trt import cache_options
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from triton_repo.client import Event, Result
    from triton_repo.schema import Setting


def run(
    url: Annotated[
        str, typer.Argument(help="Host and gRPC port of the server; the port defaults to 8001.", show_default=False)
    ],
    prompt: given.Prompt,
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4, .webm, .npz, or .png or .jpg for one frame.")],
    negative_prompt: given.NegativePrompt = None,
    size: given.Size = None,
    frames: given.Frames = None,
    image: given.Image = None,
    last_image: given.LastImage = None,
    fit: given.Fit = "official",
    preset: given.Preset = None,
    boundary: given.Boundary = None,
    steps: given.Steps = None,
    seed: Annotated[
        int | None,
        typer.Option(min=-1, max=2**63 - 1, metavar="INT", help="Seed; by default, or for -1, the server draws one."),
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    quality: given.Quality = None,
    shift: given.Shift = None,
    guidance_high_noise: given.ExpertGuidance = None,
    guidance_low_noise: given.ExpertGuidance = None,
    guidance: given.Guidance = None,
    solver: given.Solver = None,
    lora: Annotated[str | None, typer.Option(help="Name of a LoRA of the server.")] = None,
    cache: cache_options.Cache = None,
    cache_threshold: cache_options.CacheThreshold = None,
    first_exact: cache_options.FirstExact = None,
    last_exact: cache_options.LastExact = None,
    max_consecutive: cache_options.MaxConsecutive = None,
    skip_steps: cache_options.SkipSteps = None,
    reuse: cache_options.CacheReuse = None,
    late_cfg: cache_options.LateCfg = None,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds after which to give up.")] = math.inf,
    urgent: Annotated[bool, typer.Option("--urgent", help="Run before jobs that are not urgent.")] = False,
    preview: Annotated[Path | None, typer.Option(help="JPEG that shows the video in progress.")] = None,
    model: Annotated[str, typer.Option(help="Name of the served model.")] = "wan22",
) -> None:
    """Generate a video on a server; Ctrl-C cancels the job."""
    from runtime.request import Request
    from runtime.video import check_destination, renamed_at_end
    from triton_repo.wire import cache_inputs, content_of

    check_destination(output, frames or 1)
    for path in (output, preview):
        check_no_source(path, image, last_image)
    caching = Request(cache=cache_options.caching_from(locals()))
    width, height = given.size_of(size) or (None, None)
    settings: dict[str, Setting | None] = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "fps": fps,
        "quality": quality,
        "last_image": content_of(last_image),
        "fit": fit if image is not None else None,
        "preset": preset,
        "boundary": boundary,
        "steps": steps,
        "seed": None if seed == -1 else seed,
        "shift": shift,
        "guidance": guidance,
        "guidance_high_noise": guidance_high_noise,
        "guidance_low_noise": guidance_low_noise,
        "solver": solver,
        "lora": lora,
        **cache_inputs(caching),
        "output_format": _format(output),
        "preview": preview is not None,
    }
    previews = claim_file(preview, "preview", make_folder=False) if preview is not None else nullcontext()
    with renamed_at_end(output) as new, previews as shown:
        result = _Job(url, model, prompt, image, deadline, 1 if urgent else 2, shown).run(settings)
        new.write_bytes(result.video)
    event = result.event
    video = video_text(event["width"], event["height"], event["frames"])
    console.print(f"{output}: {video} at {event['fps']} fps, seed {event['seed']}")
    if "skipped" in event:
        cache_options.print_decisions(event["skipped"], event["late_cfg"], event["steps"])


@dataclass(frozen=True)
class _Job:
    """One request with a bar on the screen."""

    url: str
    model: str
    prompt: str
    image: Path | None
    deadline_s: float
    priority: Literal[1, 2]
    preview: Claim | None

    def run(self, settings: "Mapping[str, Setting | None]") -> "Result":
        """Follow the job to its result. Raises UserError if the server refuses the job or gives up."""
        from triton_repo.client import WanClient
        from triton_repo.client_errors import JobError
        from triton_repo.wire import content_of

        request = {"prompt": self.prompt, "image": content_of(self.image), **settings}
        with WanClient(self.url, self.model) as client, bars() as progress:
            job = client.submit(request, deadline_s=self.deadline_s, priority=self.priority)
            try:
                for event in job.events():
                    self._show(event, progress)
                return job.result()
            except JobError as error:
                raise error.reason from None

    def _show(self, event: "Event", progress: Progress) -> None:
        for prompt in event.get("cut", ()):
            console.print(f"{prompt.replace('_', ' ')} cut to {TEXT_TOKENS} tokens")
        if event["phase"] in ("denoise", "decode"):
            progress(event["phase"], event["step"], event["total"])
        if self.preview is not None and event["preview"]:
            self.preview.new.write_bytes(event["preview"])
            self.preview.publish()


def _format(output: Path) -> str:
    from triton_repo.schema import VIDEO_FORMATS

    formats = {**{ending: name for name, ending in VIDEO_FORMATS.items()}, ".jpeg": "jpg"}
    if output.suffix.lower() not in formats:
        raise UserError(str(output), f"a name ending in {', '.join(VIDEO_FORMATS.values())}", "rename the output")
    return formats[output.suffix.lower()]
