"""What a batch adds to the rendering of a job, and what a second worker brings.

    python -m studies.batch_cost ENGINES

Every figure is that of a further job: the time of a long batch minus that of a short one, so that opening engines and
starting processes do not count. "Rendering alone" is done by such a process without a batch. Engines have one thread.
Ray runs as a cluster on this machine, with a core per node.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.table import Table

from validate.bench.machine import load_average
from validate.bench.samples import measure_time
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan_trt.arguments import Frames, Size
from wan_trt.console import console
from wan_trt.guard import command_of
from wan_trt.recipes.batch.jobs import Job, read_jobs
from wan_trt.recipes.batch.run import Workers, run_batch
from wan_trt.recipes.batch.workers import Opening, local_workers, ray_workers

PROGRAM = "python -m studies.batch_cost"
AIM_MS, AIM_SPEED_UP = 50, 1.8


def run(
    engines: Annotated[Path, typer.Argument(help="Engine bundle for the target cpu.")],
    jobs: Annotated[
        int, typer.Option(min=2, help="Jobs of the short batch; the long one has three times as many.")
    ] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a job.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Turns of all measurements.")] = 3,
    size: Size = "128x128",
    frames: Frames = 9,
    ray: Annotated[bool, typer.Option(help="Measure Ray as well.")] = True,
) -> None:
    """Measure the cost of a job in a batch, and the speed-up of two workers over one."""
    opening = Opening(engines, threads=1)
    with scratch_folder("batch-cost") as folder:
        files = [folder / "short.jsonl", folder / "long.jsonl"]
        for file, count in zip(files, (jobs, 3 * jobs), strict=True):
            settings = {"prompt": "A red panda", "steps": steps, "size": size, "frames": frames}
            lines = ({**settings, "seed": seed} for seed in range(count))
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        short, long = ([job for job in read_jobs(file) if isinstance(job, Job)] for file in files)

        def rendered() -> float:
            with local_workers(opening) as workers, workers.open(0) as worker:
                worker.render(short[0])
                return measure_time(lambda: [worker.render(job) for job in long[len(short) :]])[1]

        def batch(file: Path, workers: Workers) -> float:
            summary = run_batch(file, tempfile.mkdtemp(dir=folder), workers)
            if summary.failed or summary.missing:
                raise UserError(f"{summary.failed + summary.missing} jobs without a video", "none", "see above")
            return summary.seconds

        found: dict[str, list[float]] = {}

        def further(name: str, workers: Workers) -> None:
            seconds = batch(files[1], workers) - batch(files[0], workers)
            found.setdefault(name, []).append(seconds / (len(long) - len(short)))

        load, plain = load_average(), list[float]()
        for _ in range(turns):
            plain.append(rendered() / (len(long) - len(short)))
            with local_workers(opening) as alone, local_workers(opening, 2) as double:
                further("one process", alone)
                further("two processes", double)
            for nodes in (1, 2) if ray else ():
                with _cluster(nodes) as address, ray_workers(opening, address, nodes) as workers:
                    further(f"Ray, {nodes} node{'s'[: nodes - 1]}", workers)
    shown = Table(
        "", "a further job", "beyond its rendering", "speed-up", title=f"{engines}, {steps} steps, one thread"
    )
    shown.add_row("rendering alone", f"{1000 * median(plain):.0f} ms", "", "")
    for name, times in found.items():
        one = found["Ray, 1 node" if name.startswith("Ray") else "one process"]
        single = times is one
        beyond = f"{1000 * (median(times) - median(plain)):.0f} ms" if single else ""
        shown.add_row(
            name, f"{1000 * median(times):.0f} ms", beyond, "" if single else f"{median(one) / median(times):.2f}"
        )
    console.print(shown)
    console.print(
        f"aims: {AIM_MS} ms, {AIM_SPEED_UP} with Ray; load average {load:.1f} before and {load_average():.1f} after"
    )


@contextmanager
def _cluster(nodes: int) -> Iterator[str]:
    """A Ray cluster on this machine, each node with one core; its address."""
    from ray.cluster_utils import Cluster

    # The head has no core, so that every actor has a node of its own.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
