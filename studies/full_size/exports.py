"""Exports at full size: peak memory on a full model of sparse files, throughput relative to ``cp``.

Sparse files take no disk space but would inflate the throughput, so it is measured on full-size blocks with random
weights. ``cp`` and the exports take turns on the same checkpoint. Each file is evicted from the page cache before it is
read. The time includes the sync of written bytes and, for both, the start of the process.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

from studies.full_size.repacked import repack
from wan22 import files
from wan22.memory import peak_rss_bytes
from wan22.outputs import check_disk
from wan22.precision import Precision
from wan22.renames import sync_tree
from wan22.specs import ModelSpec
from wan_trt.console import bars, console

T = TypeVar("T")


@dataclass(frozen=True)
class ExportCase:
    name: str
    layout: Literal["official", "diffusers"]
    half: bool  # the checkpoint's transformers are in bfloat16
    precision: Precision
    link: bool = False
    form: str = ""  # of the experts' files, see :func:`repack`; "" for the release's own


CASES = (
    *(ExportCase(f"fp32 → {precision}", "official", False, precision) for precision in Precision),
    ExportCase("bf16 → bf16, linked", "diffusers", True, Precision.BF16, link=True),
    ExportCase("fp8_scaled → fp8", "official", True, Precision.FP8, form="fp8_scaled"),
    ExportCase("fp8_scaled → bf16", "official", True, Precision.BF16, form="fp8_scaled"),
    ExportCase("Q4_K → bf16", "official", True, Precision.BF16, form="Q4_K"),
)
PLAIN = tuple(case for case in CASES if not case.link and not case.form)
TIMED = tuple(case for case in PLAIN if case.precision in (Precision.BF16, Precision.FP8))
TIMED_QUANTISED = tuple(case for case in CASES if case.name == "fp8_scaled → fp8")


def memory_of(case: ExportCase, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Export the full ``spec`` from sparse files; returns its peak resident memory, time and sizes."""
    from export.synth.checkpoint import synthesise

    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    with _remove_after(checkpoint, bundle):
        synthesise(spec, checkpoint, case.layout, 0, sparse=True, half=case.half)
        if case.form:
            repack(checkpoint, spec, case.form, sparse=True)
        console.print(f"{case.name}, all of {spec.name} in sparse files")
        started = time.perf_counter()
        peak, _ = _export(checkpoint, bundle, case, sparse=True)
        seconds = time.perf_counter() - started
        sizes = {"checkpoint_bytes": _size(checkpoint), "bundle_bytes": _size(bundle)}
        return {"case": case.name, **sizes, "seconds": seconds, "peak_rss_bytes": peak}


def throughput_of(cases: Sequence[ExportCase], spec: ModelSpec, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Time ``cp`` and every export of one checkpoint of ``spec``, in turns; all files are removed.

    ``cases`` read checkpoints of the same types and form.
    """
    from export.synth.checkpoint import synthesise, weights_bytes

    checkpoint, copy = folder / "checkpoint", folder / "copy"
    with _remove_after(checkpoint, copy, folder / "bundle"):
        check_disk(checkpoint, 3 * weights_bytes(spec))  # the checkpoint, its bundle, a copy
        with bars() as progress:
            synthesise(spec, checkpoint, "official", 0, half=cases[0].half, progress=progress)
        if cases[0].form:
            repack(checkpoint, spec, cases[0].form, sparse=False)
        cp_seconds: list[float] = []
        runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
        for turn in range(repeats):
            console.print(f"turn {turn + 1} of {repeats}: cp, {', '.join(runs)}")
            cp_seconds.append(_cp_seconds(checkpoint, copy))
            for case in cases:
                runs[case.name].append(_time_export(checkpoint, folder / "bundle", case))
        size = _size(checkpoint)
        return [{"case": name, **_compare_with_cp(size, found, cp_seconds)} for name, found in runs.items()]


@contextmanager
def _remove_after(*folders: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _export(checkpoint: Path, bundle: Path, case: ExportCase, *, sparse: bool) -> tuple[int, float]:
    """Export in a new process; returns its peak resident memory in bytes and the seconds that syncs took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_export_in_process, checkpoint, bundle, case, sparse).result()


def _export_in_process(checkpoint: Path, bundle: Path, case: ExportCase, sparse: bool) -> tuple[int, float]:
    from export.exporter import export_checkpoint
    from export.options import ExportOptions

    with bars() as progress, _timed_syncs() as seconds:
        export_checkpoint(checkpoint, bundle, ExportOptions(case.precision, link=case.link, sparse=sparse), progress)
    return peak_rss_bytes(), sum(seconds)


@contextmanager
def _timed_syncs() -> Iterator[list[float]]:
    """The seconds of every sync in the block; all outputs are synced by one function, which is replaced meanwhile."""
    seconds: list[float] = []

    def timed(path: Path) -> None:
        started = time.perf_counter()
        sync_tree(path)
        seconds.append(time.perf_counter() - started)

    with patch.object(files, "sync_tree", timed):
        yield seconds


def _time_export(checkpoint: Path, bundle: Path, case: ExportCase) -> dict[str, Any]:
    with _remove_after(bundle):
        _forget(checkpoint)
        seconds, (peak, syncs) = _seconds(lambda: _export(checkpoint, bundle, case, sparse=False))
        return {"seconds": seconds, "sync_seconds": syncs, "peak_rss_bytes": peak, "bundle_bytes": _size(bundle)}


def _cp_seconds(folder: Path, copy: Path) -> float:
    with _remove_after(copy):
        _forget(folder)
        return _seconds(lambda: subprocess.run(["cp", "-r", str(folder), str(copy)], check=True))[0]


def _compare_with_cp(checkpoint_bytes: int, runs: list[dict[str, Any]], cp_seconds: list[float]) -> dict[str, Any]:
    """The throughputs: bytes read plus bytes written per second. cp writes as many bytes as it reads."""
    bundle_bytes = runs[0]["bundle_bytes"]
    export_rates = [(checkpoint_bytes + bundle_bytes) / run["seconds"] / 1e9 for run in runs]
    cp_rates = [2 * checkpoint_bytes / seconds / 1e9 for seconds in cp_seconds]
    shares = [export / cp for export, cp in zip(export_rates, cp_rates, strict=True)]  # by turn
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "bundle_bytes": bundle_bytes,
        "export_seconds": [run["seconds"] for run in runs],
        "sync_seconds": [run["sync_seconds"] for run in runs],
        "sync_share": statistics.median(run["sync_seconds"] / run["seconds"] for run in runs),
        "cp_seconds": cp_seconds,
        "export_gb_s": statistics.median(export_rates),
        "cp_gb_s": statistics.median(cp_rates),
        "shares_of_cp": shares,
        "share_of_cp": statistics.median(shares),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _seconds(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    os.sync()
    return time.perf_counter() - started, result


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _forget(folder: Path) -> None:
    os.sync()
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
