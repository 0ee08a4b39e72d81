"""``wan-trt bench``: time and memory of engines, compared with PyTorch."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.errors import UserError
from wan22.files import whole_file
from wan22.outputs import check_apart, check_ending, check_no_source
from wan_trt import arguments as given
from wan_trt import cache_options, memory_options
from wan_trt.console import bars, command_line, console

if TYPE_CHECKING:
    from validate.bench.gateway_result import GatewayBench
    from validate.bench.served_result import ServedBench
    from validate.bench.work import BenchOptions

JOBS = 200
Axis = Literal["frames", "size", "steps"]

Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps of a run; by default 4, or 10 with --triton.")]
Runs = Annotated[
    int | None, typer.Option(min=1, help="Timed runs of every part; by default 5, or 10 full runs with --triton.")
]
Json = Annotated[Path | None, typer.Option("-o", "--json", help="Also write the JSON into this file; - prints it.")]

Jobs = Annotated[int | None, typer.Option(min=2, help="Jobs to watch the memory of --gateway; by default 200.")]
ServerTopology = Annotated[
    Literal["owner", "bls"] | None, typer.Option(help="Of the server with --triton; by default owner.")
]


@given.with_options(cache_options.OPTIONS, memory_options.OPTIONS)
def run(
    engines: given.Engines,
    checkpoint: Annotated[str | None, typer.Argument(help="Their checkpoint, to measure PyTorch as well.")] = None,
    size: given.Size = None,
    frames: given.Frames = None,
    steps: Steps = None,
    image: Annotated[Path | None, typer.Option(help="Image (I2V, TI2V); by default a built-in one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt; its length determines the text encoder's work.")] = None,
    seed: given.Seed = 0,
    runs: Runs = None,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed runs before them.")] = 1,
    whole_runs: Annotated[int, typer.Option(min=0, help="Runs from prompt to frames.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Only this part, such as vae_decoder; repeatable.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also measure torch.compile.")] = False,
    residency: given.Residency = "auto",
    reference_device: given.ReferenceDevice = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a separate process.")] = True,
    compare: Annotated[Path | None, typer.Option(help="JSON of an earlier bench, to list regressions.")] = None,
    gate: given.Gate = None,
    list_gates: given.ListGates = False,
    sweep: Annotated[Axis | None, typer.Option(help="Time several values of this instead, and fit the growth.")] = None,
    values: Annotated[str | None, typer.Option(help="Values of the sweep: 5,9,17 or 256x160,512x320.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of the sweep, .png or .html.")] = None,
    triton: Annotated[bool, typer.Option("--triton", help="Measure a server's overhead instead.")] = False,
    gateway: Annotated[bool, typer.Option("--gateway", help="Measure a gateway's overhead instead.")] = False,
    jobs: Jobs = None,
    topology: ServerTopology = None,
    cancels: Annotated[int | None, typer.Option(min=1, help="Jobs to cancel with --triton; by default 10.")] = None,
    output: Json = None,
    **shared: Any,
) -> int:
    """Measure time and memory of engines, and of PyTorch if a checkpoint is given.

    Output to a pipe or file ends with one JSON object, with units in its keys; --json - also prints it on a terminal.
    """
    request = given.request_from(locals() | shared)
    from validate.bench.work import RUNS, BenchOptions

    options = BenchOptions(
        request, tuple(only or ()), runs or RUNS, warmup, compiled, memory, whole_runs, reference_device, residency,
        command_line(), memory_options.blocks_options(shared),
    )  # fmt: skip
    if list_gates:
        return _list_gates(engines)
    asked = locals()
    _check(asked)
    to_stdout = str(output) == "-" or not sys.stdout.isatty()
    in_file = output is not None and str(output) != "-"
    with whole_file(output, "output", make_folder=False) if output and in_file else nullcontext() as new:
        if triton or gateway:
            found, passed = _served(engines, options, runs, asked)
        elif options.blocks.gpus is not None or options.blocks.parallel is not None:
            found, passed = _scaled(engines, options)
        elif sweep is not None:
            found, passed = _swept(engines, checkpoint, sweep, values, options, plot)
        else:
            found, passed = _benched(engines, checkpoint, options, gate, compare)
        line = json.dumps(found, separators=(",", ":"), allow_nan=False)
        if to_stdout:
            print(line, flush=True)
        if new is not None:
            new.write_text(f"{line}\n")
    return 0 if passed else 1


def _list_gates(engines: Path) -> int:
    from validate.bench.result import known_measurements
    from wan22.bundle import open_bundle

    for name in known_measurements(open_bundle(engines, "engines").manifest.spec):
        print(name)
    return 0


def _check(asked: Mapping[str, Any]) -> None:
    """Raise UserError for options of the command that do not go together, and for outputs that are inputs."""
    sweep, alone = asked["sweep"], "run it on its own"
    if sweep is None and (asked["values"] or asked["plot"]):
        raise UserError("--values or --plot", "a sweep to apply them to", "add --sweep frames, size or steps")
    if sweep is not None and (asked["gate"] or asked["compare"]):
        raise UserError("--sweep with --gate or --compare", "one of them", alone)
    if not asked["triton"] and (asked["topology"] or asked["cancels"]):
        raise UserError("--topology or --cancels", "a server to measure", "add --triton")
    if not asked["gateway"] and asked["jobs"]:
        raise UserError("--jobs", "a gateway to measure", "add --gateway")
    if asked["gateway"] and (asked["checkpoint"] or sweep or asked["compare"] or asked["triton"]):
        raise UserError("--gateway with a checkpoint, --sweep, --compare or --triton", "engines alone", alone)
    if asked["triton"] and (asked["checkpoint"] or sweep or asked["compare"]):
        raise UserError("--triton with a checkpoint, --sweep or --compare", "engines alone", alone)
    if (asked["triton"] or asked["gateway"]) and asked["only"]:
        raise UserError("--only with --triton or --gateway", "whole jobs, which use all pieces", "leave --only out")
    devices = asked["options"].blocks
    scaled = (devices.gpus or devices.parallel) and not (asked["triton"] or asked["gateway"])
    if scaled and (asked["checkpoint"] or sweep or asked["compare"] or asked["gate"] or asked["only"]):
        found = "--gpus or --parallel with a checkpoint, --only, --sweep, --compare or --gate"
        raise UserError(found, "engines alone", alone)
    if asked["request"].cache is not None and (asked["triton"] or asked["gateway"] or sweep is not None):
        raise UserError("a step cache with --triton, --gateway or --sweep", "a bench of engines", alone)
    check_apart(asked["output"], asked["plot"])
    sources = [asked[name] for name in ("engines", "gate", "compare", "image")]
    for path in (asked["output"], asked["plot"]):
        if path is not None and not path.is_dir():  # a folder is refused by its type later
            check_no_source(path, *sources, cache_options.skip_steps_file(asked["shared"].get("skip_steps")))
    if asked["output"] is not None and str(asked["output"]) != "-":
        check_ending(asked["output"], "--json", ".json")


def _served(
    engines: Path, options: "BenchOptions", runs: int | None, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A bench of ``--triton`` or ``--gateway``."""
    from triton_repo.installation import default_environments, find_installation
    from validate.bench.served import bench_served
    from validate.bench.through_gateway import bench_gateway
    from validate.bench.two_sides import RUNS, ServedOptions

    served = ServedOptions(
        options.request, asked["topology"] or "owner", runs or RUNS, cancels=asked["cancels"] or 10, gate=asked["gate"],
        residency=options.residency, command=options.command, blocks=options.blocks,
    )  # fmt: skip
    installation = find_installation(default_environments())
    found: ServedBench | GatewayBench
    with bars() as progress:
        if asked["gateway"]:
            found = bench_gateway(engines, served, asked["jobs"] or JOBS, installation, os.environ, progress)
        else:
            found = bench_served(engines, served, installation, os.environ, progress)
    for part in found.as_text():
        console.print(part)
    return found.as_json(), bool(found)


def _scaled(engines: Path, options: "BenchOptions") -> tuple[dict[str, Any], bool]:
    from validate.bench.scaling import bench_scaling

    with bars() as progress:
        found = bench_scaling(engines, options, progress)
    for part in found.as_text():
        console.print(part)
    return found.as_json(), True


def _benched(
    engines: Path, checkpoint: str | None, options: "BenchOptions", gate: Path | None, compare: Path | None
) -> tuple[dict[str, Any], bool]:
    from validate.bench.measure import bench
    from validate.bench.report import Criteria
    from validate.bench.view import as_text

    with bars() as progress:
        report = bench(engines, checkpoint, options, progress, Criteria(gate, compare))
    for part in as_text(report):
        console.print(part)
    return report.as_json(), bool(report)


def _swept(
    engines: Path, checkpoint: str | None, axis: Axis, values: str | None, options: "BenchOptions", plot: Path | None
) -> tuple[dict[str, Any], bool]:
    from validate.bench.sweep import sweep
    from validate.bench.sweep_view import as_text, check_plot, write_plot

    if plot is not None:
        check_plot(plot)
    several = None if values is None else [value.strip() for value in values.split(",")]
    with whole_file(plot, "plot", make_folder=False) if plot is not None else nullcontext() as picture:
        with bars() as progress:
            found = sweep(engines, checkpoint, axis, several, options, progress)
        if picture is not None:
            write_plot(found, picture)
    for part in as_text(found):
        console.print(part)
    return found.as_json(), not found.faults
