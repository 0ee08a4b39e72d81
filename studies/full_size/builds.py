"""Full-size engines built without a GPU (``--builds``): build time, size and memory.

Weights of whole engines are random numbers, since a compiler might optimise zeros away. Those of engines in blocks are
holes in sparse files, because the compiler never sees them.
"""

import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from validate.bench.machine import load_average
from wan22.precision import Precision
from wan22.specs import ModelSpec, spec_named
from wan_trt.console import bars


@dataclass(frozen=True)
class BuildCase:
    model: str
    target: str
    size: str
    frames: str
    topology: Literal["whole", "blocks"]
    limit_bytes: int  # of peak memory

    @property
    def name(self) -> str:
        return f"{self.model} fp8 for {self.target}, {self.size}, {self.frames} frames, {self.topology}"


BUILDS = (
    BuildCase("ti2v-5b", "rtx4090", "1280x704", "121", "whole", 20 * 10**9),
    BuildCase("t2v-a14b", "rtx5090", "832x480", "81", "blocks", 3 * 10**9),
)


def measure_build(case: BuildCase, folder: Path) -> dict[str, Any]:
    """Make checkpoint, bundle and engines below ``folder`` and remove them; returns the figures of the build."""
    checkpoint, onnx, engines = folder / "checkpoint", folder / "onnx", folder / "engines"
    try:
        _export(spec_named(case.model), checkpoint, onnx, sparse=case.topology == "blocks")
        shutil.rmtree(checkpoint)  # hard links in the bundle keep the shared files
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return {"case": case.name, **process.submit(_build, case, onnx, engines).result()}
    finally:
        for made in (checkpoint, onnx, engines):
            shutil.rmtree(made, ignore_errors=True)


def _export(spec: ModelSpec, checkpoint: Path, onnx: Path, *, sparse: bool) -> None:
    from export.exporter import export_checkpoint
    from export.options import ExportOptions
    from export.synth.checkpoint import synthesise

    with bars() as progress:
        synthesise(spec, checkpoint, "diffusers", 0, sparse=sparse, half=True, progress=progress)
        export_checkpoint(checkpoint, onnx, ExportOptions(Precision.FP8, link=True, sparse=sparse), progress)


def _build(case: BuildCase, onnx: Path, engines: Path) -> dict[str, Any]:
    from engines.build import BuildOptions, build_engines
    from engines.inspect.inspection import inspect_engines

    options = BuildOptions(case.target, case.size, case.frames, topology=case.topology)
    started = time.process_time()
    with bars() as progress:
        manifest = build_engines(onnx, engines, options, progress).manifest
    build, cpu_seconds = manifest.build, time.process_time() - started
    assert build is not None
    reports = inspect_engines(engines, manifest.spec.experts[:1])
    steps = [report for report in reports if not report.component.endswith(".text_kv")]
    graphs = {file.path: file.size_bytes for c in manifest.components for part in c.compiled() for file in [part.graph]}
    return {
        "build_seconds": build.seconds,
        "cpu_seconds": round(cpu_seconds, 1),  # with the check of the bundle's hashes
        "load_average": load_average(),
        "peak_rss_bytes": build.peak_rss_bytes,
        "limit_bytes": case.limit_bytes,
        "engine_bytes": graphs,
        "kernels_per_block": {case.topology: sum(report.summary()["kernels_per_block"] or 0 for report in steps)},
    }
