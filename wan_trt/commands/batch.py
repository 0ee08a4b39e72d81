"""``wan-trt batch``: a file of jobs → a folder of videos."""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from wan22.errors import UserError
from wan_trt import arguments as given
from wan_trt.console import bars, console


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
        list[str] | None, typer.Option(metavar="URL", help="A Triton server; repeat for several.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name of the served model.")] = "wan22",
    residency: given.Residency = "auto",
) -> int:
    """Render many prompts; run it again to make what is missing."""
    from wan_trt.recipes.batch.run import run_batch
    from wan_trt.recipes.batch.workers import local_workers, ray_workers, server_workers, visible_gpus

    if (engines is None) == (server is None):
        raise UserError("engines and servers" if engines else "no engines", "--engines or --server", "name one of them")
    if server and (ray or workers or gpus):
        raise UserError("--server with --ray, --workers or --gpus", "one way to render", "leave the others out")
    if ray and gpus:
        raise UserError("--gpus with --ray", "--workers", "Ray places actors on GPUs itself")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    with ExitStack() as stack:
        if server:
            who = server_workers(server, model)
        elif ray:
            assert engines is not None
            who = stack.enter_context(ray_workers(engines, ray, workers, residency))
        else:
            assert engines is not None
            who = local_workers(engines, workers, visible_gpus(engines, gpus), residency)
        progress = stack.enter_context(bars())
        summary = run_batch(jobs, output, who, progress=progress, tell=console.print)
    rate = f"{summary.videos_per_hour:.0f} videos an hour" if summary.done else "none made"
    each = (
        f", {summary.worker_seconds / summary.done:.1f} {'GPU-' if who.gpus else 'worker-'}seconds each"
        if summary.done
        else ""
    )
    console.print(
        f"{output}: {summary.done} done, {summary.failed} failed, {summary.earlier} from earlier runs; {rate}{each}"
    )
    return 1 if summary.failed else 0
