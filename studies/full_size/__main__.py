"""``python -m studies.full_size``: time and memory of export and build at full size, measured on this machine.

The export's memory is measured on the full model in sparse files, which take no disk space; its throughput on dense
blocks, compared with ``cp`` on the same disk. Parts can be measured one by one: each replaces its own figures in the
file and keeps the others.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from studies.full_size.builds import BUILDS, measure_build
from studies.full_size.exports import CASES, TIMED, TIMED_QUANTISED, memory_of, throughput_of
from wan22.errors import UserError
from wan22.files import write_file
from wan22.quantities import human_bytes
from wan22.specs import ModelSpec, spec_named
from wan_trt.console import console
from wan_trt.guard import command_of

PROGRAM = "python -m studies.full_size"
MEMORY_LIMIT_BYTES = 2 * 10**9
CP_SHARE = 0.6  # minimum throughput, as a share of cp's
SYNC_SHARE = 0.03  # maximum time in syncs, as a share of an export's

Figures = dict[str, Any]


class StudyPart(StrEnum):
    GRAPH = "graph"
    THROUGHPUT = "throughput"
    MEMORY = "memory"
    BUILDS = "builds"


def run(
    model: Annotated[str, typer.Argument(help="The model whose export is measured.")] = "t2v-a14b",
    folder: Annotated[Path, typer.Option(help="A folder on the disk to measure.")] = Path("scale"),
    only: Annotated[
        list[StudyPart] | None,
        typer.Option(help="Measure only this part; repeatable. The default is all except builds."),
    ] = None,
    case: Annotated[
        str, typer.Option(help="Only exports and builds whose name contains this, such as fp8 or 5090.")
    ] = "",
    layers: Annotated[int, typer.Option(min=1, help="Number of full-size blocks to export for the throughput.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Number of turns of cp and the exports.")] = 3,
    builds: Annotated[
        bool, typer.Option("--builds", help="Also build the 5B and the 14B for GPUs: 45 GB of disk, 20 minutes.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file of figures.")] = Path("scale.json"),
) -> int:
    """Measure export and build at full size: throughput relative to cp, peak memory, time to write a graph."""
    spec = spec_named(model)
    parts = {*(only or set(StudyPart) - {StudyPart.BUILDS}), *({StudyPart.BUILDS} if builds else ())}
    names = [*(export.name for export in CASES), *(build.name for build in BUILDS)]
    if not any(case in name for name in names):
        raise UserError(f"--case {case!r}", f"part of one of {'; '.join(names)}", "correct --case")
    figures = _earlier(output, spec)
    _write(figures, output)  # before the long work, to fail now if the file cannot be written
    with _own_folder(folder) as place:
        for name, found in _measure(parts, case, spec, place, (layers, repeats)):
            figures[name] = found if isinstance(found, float) else _merge(figures.get(name, []), found)
            _write(figures, output)
    for table in _tables(figures):
        console.print(table)
    if "graph_seconds" in figures:
        console.print(f"graph of one transformer: {figures['graph_seconds']:.1f} s")
    console.print(f"figures in {output}")
    return 0 if _good(figures) else 1


def _measure(
    parts: set[StudyPart], case: str, spec: ModelSpec, folder: Path, dense: tuple[int, int]
) -> Iterator[tuple[str, float | list[Figures]]]:
    """Yield each name in the file of figures with its result, as soon as it is measured."""
    layers, repeats = dense
    if StudyPart.GRAPH in parts:
        yield "graph_seconds", _graph_seconds(spec)
    text = replace(spec.text_encoder, layers=layers)
    small = replace(spec, dit=replace(spec.dit, layers=layers), text_encoder=text)
    for alike in (TIMED, TIMED_QUANTISED) if StudyPart.THROUGHPUT in parts else ():
        if timed := [export for export in alike if case in export.name]:
            found = throughput_of(timed, small, folder, repeats)
            yield "throughput", [entry | {"layers": layers} for entry in found]
    for export in CASES if StudyPart.MEMORY in parts else ():
        if case in export.name:
            yield "memory", [memory_of(export, spec, folder)]
    for build in BUILDS if StudyPart.BUILDS in parts else ():
        if case in build.name:
            console.print(f"build of {build.name}")
            yield "builds", [measure_build(build, folder)]


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder``, removed at the end with its content; nothing else is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = TemporaryDirectory(prefix="wan-trt-scale-", dir=folder)
    except OSError as error:
        found = f"cannot write to {folder}: {error.strerror}"
        raise UserError(found, "a writable folder with free space", "name another with --folder") from None
    with made as name:
        yield Path(name)


def _write(figures: Figures, output: Path) -> None:
    write_file(output, json.dumps(figures, indent=2).encode() + b"\n")


def _earlier(output: Path, spec: ModelSpec) -> Figures:
    """The figures of the same model in the file."""
    if not output.is_file():
        return {"model": spec.name}
    try:
        figures = json.loads(output.read_bytes())
        name = figures["model"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output} holds no figures", f"a file that {PROGRAM} wrote", "name another file") from None
    if name != spec.name:
        raise UserError(f"{output} has figures of {name}", f"figures of {spec.name}", "name another file")
    return dict(figures)


def _merge(earlier: list[Figures], found: list[Figures]) -> list[Figures]:
    """Merge figures; new ones replace earlier ones of the same case."""
    again = {entry["case"] for entry in found}
    return [entry for entry in earlier if entry["case"] not in again] + found


def _good(figures: Figures) -> bool:
    rates = [entry["share_of_cp"] >= CP_SHARE for entry in figures.get("throughput", ())]
    syncs = [entry["sync_share"] <= SYNC_SHARE for entry in figures.get("throughput", ())]
    peaks = [entry["peak_rss_bytes"] <= MEMORY_LIMIT_BYTES for entry in figures.get("memory", ())]
    builds = [entry["peak_rss_bytes"] <= entry["limit_bytes"] for entry in figures.get("builds", ())]
    return all([*rates, *syncs, *peaks, *builds])


def _graph_seconds(spec: ModelSpec) -> float:
    """The time to write the graph of one transformer in memory."""
    from export.graphs.dit import dit_graph

    started = time.perf_counter()
    dit_graph(spec.dit)
    return time.perf_counter() - started


def _tables(figures: Figures) -> Iterator[Table]:
    tables = {"memory": _memory_table, "throughput": _throughput_table, "builds": _builds_table}
    yield from (table(figures) for name, table in tables.items() if figures.get(name))


def _memory_table(figures: Figures) -> Table:
    table = Table("export", "bytes", "time", "memory", title=f"Export of all of {figures['model']}, sparse files")
    for entry in figures["memory"]:
        table.add_row(entry["case"], _from_to(entry), f"{entry['seconds']:.0f} s", _gb(entry["peak_rss_bytes"]))
    return table


def _throughput_table(figures: Figures) -> Table:
    title = f"Export of dense blocks of {figures['model']} and cp of the checkpoint, bytes read and written"
    table = Table("export", "blocks", "bytes", "export", "GB/s", "cp", "GB/s", "share", "lowest", "syncs", title=title)
    for entry in figures["throughput"]:
        export = _seconds(entry["export_seconds"]), f"{entry['export_gb_s']:.2f}"
        cp = _seconds(entry["cp_seconds"]), f"{entry['cp_gb_s']:.2f}"
        shares = f"{entry['share_of_cp']:.0%}", f"{min(entry['shares_of_cp']):.0%}", f"{entry['sync_share']:.1%}"
        table.add_row(entry["case"], str(entry["layers"]), _from_to(entry), *export, *cp, *shares)
    return table


def _builds_table(figures: Figures) -> Table:
    table = Table("build", "time", "memory", "plans", "kernels per block", title="Builds without a GPU")
    for build in figures["builds"]:
        whole: Counter[str] = Counter()
        for name, size in build["engine_bytes"].items():
            whole[re.sub("(?<=coder)_.*", "", name.split(".")[0])] += size
        sizes = "\n".join(f"{name} {human_bytes(size)}" for name, size in whole.items())
        kernels = ", ".join(f"{count} {style}" for style, count in build["kernels_per_block"].items())
        times = f"{build['build_seconds']:.0f} s", _gb(build["peak_rss_bytes"])
        table.add_row(build["case"], *times, sizes, kernels)
    return table


def _seconds(runs: list[float]) -> str:
    return ", ".join(f"{seconds:.1f}" for seconds in runs) + " s"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def _from_to(found: Figures) -> str:
    return f"{found['checkpoint_bytes'] / 1e9:.1f} → {_gb(found['bundle_bytes'])}"


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
