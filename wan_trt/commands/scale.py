"""``wan-trt scale``: what an export costs at full size, beside ``cp`` on the same disk, in one run.

Memory and time to write a graph come from the whole model with sparse files, which take no disk. Throughput comes from
real-size blocks with dense random weights, as many as ``--layers`` says, since zeros in holes would flatter it. ``cp``
copies that checkpoint, before and after the export, on the same disk. Every file is pushed out of the system's cache
before it is read, and written bytes are synced, for export and cp alike; the seconds that PyTorch takes to load count
for the export. Both are judged by bytes read and written in a second.
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wan22.bundle import check_disk
from wan22.memory import peak_rss_bytes
from wan22.specs import ModelSpec, Precision, spec_named
from wan_trt.console import console
from wan_trt.scale_builds import BUILDS, measured_build

if TYPE_CHECKING:
    from rich.console import RenderableType

MEMORY_LIMIT_BYTES = 2 * 10**9
CP_SHARE = 0.6  # of cp's throughput, at least


@dataclass(frozen=True)
class Case:
    name: str
    layout: Literal["official", "diffusers"]
    half: bool  # transformers of the checkpoint in bfloat16
    precision: Precision
    link: bool = False


CASES = (
    Case("fp32 → bf16", "official", False, Precision.BF16),
    Case("fp32 → fp8", "official", False, Precision.FP8),
    Case("bf16 → bf16, linked", "diffusers", True, Precision.BF16, link=True),
)


def run(
    model: Annotated[str, typer.Argument(help="The model to measure with.")] = "t2v-a14b",
    folder: Annotated[Path, typer.Option(help="An empty place on the disk to measure.")] = Path("scale"),
    layers: Annotated[int, typer.Option(min=1, help="Real-size blocks of the dense checkpoint.")] = 2,
    builds: Annotated[
        bool, typer.Option("--builds", help="Also build the 5B and the 14B for GPUs: 45 GB of disk, 20 minutes.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = Path("scale.json"),
) -> int:
    """Measure export at full size: throughput beside cp, peak memory, time to write a graph."""
    spec = spec_named(model)
    small = replace(spec, dit=replace(spec.dit, layers=layers), text_encoder=replace(spec.text_encoder, layers=layers))
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"model": spec.name, "layers_dense": layers, "graph_seconds": _graph_seconds(spec)}
    figures["cases"], figures["builds"] = [], []
    for case in CASES:
        whole = _measured(case, spec, folder, sparse=True)
        dense = _measured(case, small, folder, sparse=False)
        figures["cases"].append({"case": case.name, "whole_sparse": whole, "dense": dense})
        console.print(f"measured {case.name}")
    for build in BUILDS if builds else ():
        figures["builds"].append(measured_build(build, folder))
        console.print(f"measured {build.name}")
    output.write_text(json.dumps(figures, indent=2) + "\n")
    for table in _tables(figures):
        console.print(table)
    console.print(f"graph of one transformer: {figures['graph_seconds']:.1f} s; figures in {output}")
    good = [*map(_good, figures["cases"]), *(b["peak_rss_bytes"] <= b["limit_bytes"] for b in figures["builds"])]
    return 0 if all(good) else 1


def _good(case: dict[str, Any]) -> bool:
    rate = case["dense"].get("throughput_of_cp", 1.0)
    return bool(case["whole_sparse"]["peak_rss_bytes"] <= MEMORY_LIMIT_BYTES and rate >= CP_SHARE)


def _tables(figures: dict[str, Any]) -> "Iterator[RenderableType]":
    from rich.table import Table

    yield _export_table(figures)
    if figures["builds"]:
        builds = Table("build", "time", "memory", "engines", "kernels per block", title="Builds without a GPU")
        for build in figures["builds"]:
            sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in build["engine_bytes"].items())
            kernels = ", ".join(f"{count} {style}" for style, count in build["kernels_per_block"].items())
            times = f"{build['build_seconds']:.0f} s", f"{build['peak_rss_bytes'] / 1e9:.1f} GB"
            builds.add_row(build["build"], *times, sizes, kernels)
        yield builds


def _export_table(figures: dict[str, Any]) -> "RenderableType":
    from rich.table import Table

    layers, model = figures["layers_dense"], figures["model"]
    title = f"Export of {model}; memory: whole, sparse files; time: {layers} blocks of random weights, read and written"
    table = Table("export", "whole", "memory", "blocks", "export", "cp of the checkpoint", "share", title=title)
    for case in figures["cases"]:
        whole, dense = case["whole_sparse"], case["dense"]
        rate = f"{(dense['checkpoint_bytes'] + dense['bundle_bytes']) / dense['export_seconds'] / 1e9:.2f} GB/s"
        cp = f"{dense['cp_seconds']:.1f} s, {dense['cp_gb_s']:.2f} GB/s" if "cp_seconds" in dense else "-"
        table.add_row(
            case["case"],
            _from_to(whole),
            f"{whole['peak_rss_bytes'] / 1e9:.2f} GB",
            _from_to(dense),
            f"{dense['export_seconds']:.1f} s" + ("" if cp == "-" else f", {rate}"),
            cp,
            f"{dense['throughput_of_cp']:.0%}" if "cp_seconds" in dense else "linked",
        )
    return table


def _from_to(found: dict[str, Any]) -> str:
    return f"{found['checkpoint_bytes'] / 1e9:.1f} → {found['bundle_bytes'] / 1e9:.1f} GB"


def _graph_seconds(spec: ModelSpec) -> float:
    """Authoring the graph of one transformer, in memory."""
    from export.dit import dit_graph

    started = time.perf_counter()
    dit_graph(spec.dit)
    return time.perf_counter() - started


def _measured(case: Case, spec: ModelSpec, folder: Path, *, sparse: bool) -> dict[str, Any]:
    """Makes the checkpoint, exports it in a process of its own, copies the result with cp; leaves nothing behind."""
    from export.synth import synthesise

    checkpoint, bundle, copy = folder / "checkpoint", folder / "bundle", folder / "copy"
    try:
        if not sparse:
            check_disk(checkpoint, 3 * _weights_bytes(spec))  # the checkpoint, its bundle, a copy
        synthesise(spec, checkpoint, case.layout, 0, sparse=sparse, half=case.half)
        before = [] if sparse or case.link else [_cp_seconds(checkpoint, copy)]
        found = {"checkpoint_bytes": _size(checkpoint)}
        found |= _timed(checkpoint, bundle, case, sparse=sparse)
        found["bundle_bytes"] = _size(bundle)
        if before:
            found |= _beside_cp(found, [*before, _cp_seconds(checkpoint, copy)])
        return found
    finally:
        for made in (checkpoint, bundle, copy):
            shutil.rmtree(made, ignore_errors=True)


def _weights_bytes(spec: ModelSpec) -> int:
    """Of a checkpoint in float32."""
    from export.schema import part_tensors

    parts = (part_tensors(part, spec) for part in (*spec.experts, "text_encoder", "vae"))
    return sum(4 * prod(shape) for shapes in parts for shape in shapes.values())


def _timed(checkpoint: Path, bundle: Path, case: Case, *, sparse: bool) -> dict[str, Any]:
    _forget(checkpoint)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        seconds, peak = process.submit(_export, checkpoint, bundle, case, sparse).result()
    return {"export_seconds": seconds, "peak_rss_bytes": peak}


def _export(checkpoint: Path, bundle: Path, case: Case, sparse: bool) -> tuple[float, int]:
    from export.exporter import export_checkpoint
    from export.options import ExportOptions

    options = ExportOptions(case.precision, link=case.link, sparse=sparse)
    seconds = _seconds(lambda: export_checkpoint(checkpoint, bundle, options))
    return seconds, peak_rss_bytes()


def _cp_seconds(folder: Path, copy: Path) -> float:
    _forget(folder)
    seconds = _seconds(lambda: subprocess.run(["cp", "-r", "--sparse=never", str(folder), str(copy)], check=True))
    shutil.rmtree(copy)
    return seconds


def _beside_cp(export: dict[str, Any], cp_seconds: Sequence[float]) -> dict[str, Any]:
    """Throughput is bytes read plus bytes written, in a second; cp reads the checkpoint and writes as much."""
    seconds = statistics.mean(cp_seconds)
    export_rate = (export["checkpoint_bytes"] + export["bundle_bytes"]) / export["export_seconds"] / 1e9
    cp_rate = 2 * export["checkpoint_bytes"] / seconds / 1e9
    rates = {"export_gb_s": export_rate, "cp_gb_s": cp_rate, "throughput_of_cp": export_rate / cp_rate}
    return {"cp_seconds": seconds, "cp_runs_seconds": list(cp_seconds), **rates}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - started


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _forget(folder: Path) -> None:
    os.sync()
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
