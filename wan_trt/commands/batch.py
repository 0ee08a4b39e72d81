"""``wan-trt batch``: a file of jobs → a folder of videos."""

import math
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wan22.errors import UserError
from wan22.inputs import secret_in
from wan_trt import arguments as given
from wan_trt import memory_options
from wan_trt.console import bars, console

if TYPE_CHECKING:
    from wan_trt.recipes.batch.run import Summary


BEAT_S = 60.0  # between signs of life, where there is no terminal for a bar


@given.with_options(memory_options.MEMORY)
def run(
    jobs: Annotated[Path, typer.Argument(help="JSON lines, one job each.", show_default=False)],
    output: Annotated[
        str, typer.Argument(help="Folder, or a URL that fsspec opens, as s3://bucket/batch.", show_default=False)
    ],
    engines: Annotated[
        Path | None, typer.Option(help="Engine bundle made by wan-trt build.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes or actors; 0: one per GPU or node.")] = 0,
    gpus: Annotated[str, typer.Option(metavar="LIST", help="Numbers of the GPUs, as 0,1; by default all.")] = "",
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster; auto for this machine's.")] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="HOST:PORT of a Triton server, or http://HOST:PORT of a gateway; repeat it."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the gateway's key; by default WAN_TRT_KEY has it.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name of the served model.")] = "wan22",
    residency: given.Residency = "auto",
    **shared: Any,
) -> int:
    """Render many prompts; run it again to make what is missing."""
    from wan_trt.recipes.batch.run import Summary, run_batch
    from wan_trt.recipes.batch.servers import KEY_VARIABLE, server_workers
    from wan_trt.recipes.batch.workers import Opening, local_workers, ray_workers, visible_gpus

    if (engines is None) == (server is None):
        raise UserError("engines and servers" if engines else "no engines", "--engines or --server", "name one of them")
    if server and (ray or workers or gpus):
        raise UserError("--server with --ray, --workers or --gpus", "one way to render", "leave the others out")
    if server and (any(shared.values()) or residency != "auto"):
        raise UserError("options of memory with --server", "the server's own", "give them to wan-trt serve")
    if key is not None and not any(url.startswith(("http://", "https://")) for url in server or ()):
        raise UserError("--key without a gateway", "a gateway beside it", "add --server http://HOST:PORT")
    if model != "wan22" and not server:
        raise UserError("--model without --server", "servers, which have models by name", "leave it out")
    if ray and gpus:
        raise UserError("--gpus with --ray", "--workers", "Ray places actors on GPUs itself")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    with ExitStack() as stack:
        if server:
            secret = os.environ.get(KEY_VARIABLE, "") if key is None else secret_in(key, "--key")
            who = server_workers(server, model, secret)
        else:
            assert engines is not None
            opening = Opening(engines, residency, memory_options.blocks_options(shared))
            here = None if ray else visible_gpus(engines, gpus)
            found = ray_workers(opening, ray, workers) if ray else local_workers(opening, workers, here or ())
            who = stack.enter_context(found)
        progress = stack.enter_context(bars())
        beat_s, summary = math.inf if console.is_terminal else BEAT_S, Summary()
        try:
            run_batch(jobs, output, who, summary=summary, progress=progress, tell=console.print, beat_s=beat_s)
        except (KeyboardInterrupt, UserError):
            if summary.seconds:
                _print_counts(output, summary, on_gpu=bool(who.gpus))
            raise
    _print_counts(output, summary, on_gpu=bool(who.gpus))
    return 1 if summary.failed else 0


def _print_counts(output: str, summary: "Summary", *, on_gpu: bool) -> None:
    rate = ""
    if summary.done:
        each = f"{summary.worker_seconds / summary.done:.1f} {'GPU-' if on_gpu else 'worker-'}seconds each"
        rate = f"; {summary.videos_per_hour:.0f} videos an hour, {each}"
    missing = f", {summary.missing} not made" if summary.missing else ""
    counts = f"{summary.done} done, {summary.failed} failed, {summary.earlier} from earlier runs{missing}"
    console.print(f"{output}: {counts}{rate}")
