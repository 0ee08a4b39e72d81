"""``wan-trt triton``: engines → Triton model repository."""

from pathlib import Path
from typing import Annotated

import typer

from wan_trt.arguments import Overwrite
from wan_trt.console import console

Limit = Annotated[int | None, typer.Option(help="Largest request; the model's largest official one unless given.")]


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle made by wan-trt build.", show_default=False)],
    repository: Annotated[Path, typer.Argument(help="Folder to write the repository to.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name to serve the model under.")] = "wan22",
    engines_at: Annotated[str, typer.Option(help="Where the engines lie on the server, if not where they are.")] = "",
    max_pixels: Limit = None,
    max_frames: Limit = None,
    max_steps: Limit = None,
    queue_size: Annotated[int, typer.Option(help="Jobs that may wait, per priority.", min=1)] = 8,
    longest_job: Annotated[int, typer.Option(help="Seconds a job may run, and a shutdown waits.", min=1)] = 3600,
    one_expert: Annotated[bool, typer.Option("--one-expert", help="Keep one expert in memory at a time.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Package engines as a Triton model repository."""
    from triton_repo.repository import RepositoryOptions, write_repository

    options = RepositoryOptions(
        name,
        limits={
            "max_pixels": max_pixels,
            "max_frames": max_frames,
            "max_steps": max_steps,
            "max_queue_size": queue_size,
            "longest_job_s": longest_job,
        },
        engines_at=engines_at,
        keep_experts=not one_expert,
        overwrite=overwrite,
    )
    bundle = write_repository(engines, repository, options).bundle
    console.print(f"{bundle.manifest.spec.name} as Triton model {name}: {repository}")
