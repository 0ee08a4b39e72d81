"""``wan-trt client``: a prompt → video from a running server."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.files import Claim, claim_file
from wan22.looks import with_terms
from wan22.outputs import check_apart, check_no_source
from wan22.progress import Progress
from wan22.quantities import video_text
from wan22.specs import TEXT_TOKENS
from wan_trt import arguments as given
from wan_trt import cache_options, prompt_options
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from triton_repo.client import Event, Result
    from triton_repo.schema import Setting


@given.with_options(given.SAMPLING, cache_options.OPTIONS, prompt_options.OPTIONS)
def run(
    url: Annotated[
        str, typer.Argument(help="Host and gRPC port of the server; the port defaults to 8001.", show_default=False)
    ],
    prompt: given.Prompt,
    output: Annotated[Path, typer.Option("-o", "--output", help=".mp4, .webm, .npz, or .png or .jpg for one frame.")],
    size: given.Size = None,
    frames: given.Frames = None,
    image: given.Image = None,
    last_image: given.LastImage = None,
    fit: given.Fit = "official",
    seed: Annotated[
        int | None,
        typer.Option(min=-1, max=2**63 - 1, metavar="INT", help="Seed; by default, or for -1, the server draws one."),
    ] = None,
    noise: given.Noise = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    quality: given.Quality = None,
    lora: Annotated[str | None, typer.Option(help="Name of a LoRA of the server.")] = None,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds after which to give up.")] = math.inf,
    urgent: Annotated[bool, typer.Option("--urgent", help="Run before jobs that are not urgent.")] = False,
    preview: Annotated[Path | None, typer.Option(help="JPEG that shows the video in progress.")] = None,
    model: Annotated[str, typer.Option(help="Name of the served model.")] = "wan22",
    **shared: Any,
) -> None:
    """Generate a video on a server; Ctrl-C cancels the job."""
    from runtime.request import Request
    from runtime.video import check_destination, renamed_at_end
    from triton_repo.wire import cache_inputs, content_of

    check_destination(output, frames or 1)
    given.check_used(output, quality, image, fit)
    check_apart(output, preview)
    for path in (output, preview):
        check_no_source(path, image, last_image, noise, cache_options.skip_steps_file(shared["skip_steps"]))
    prompt = with_terms(prompt, prompt_options.terms_from(shared), image=image is not None)
    caching = Request(cache=cache_options.caching_from(locals() | shared))
    latents = given.noise_of(noise)
    settings: dict[str, Setting | None] = {
        **{name: shared[name] for name in given.SAMPLING},
        **dict(zip(("width", "height"), given.size_of(size) or (), strict=False)),
        "num_frames": frames,
        "fps": fps,
        "quality": quality,
        "last_image": content_of(last_image),
        "fit": fit if image is not None else None,
        "seed": None if seed == -1 else seed,
        "lora": lora,
        "noise": None if latents is None else latents.tobytes(),
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
