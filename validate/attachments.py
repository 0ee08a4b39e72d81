"""What a report holds beside parity: the bundle, a bench, the compiler's kernels, and the gates on all of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.result import FORMAT, known_measurements
from validate.gate import Gate, has_table, read_gates
from validate.options import ValidateOptions
from wan22.bundle import Bundle, Manifest
from wan22.errors import UserError


@dataclass(frozen=True)
class Attached:
    gates: tuple[Gate, ...] = ()  # on what a validation measures
    bench_gates: tuple[Gate, ...] = ()
    bench: Mapping[str, Any] | None = None  # the JSON of ``wan-trt bench``
    fusion: tuple[Mapping[str, Any], ...] = ()  # of every engine, as ``wan-trt inspect --json`` has it
    why_no_fusion: str = ""
    manifest: Manifest | None = None

    @property
    def bench_measured(self) -> Mapping[str, float]:
        return {} if self.bench is None else self.bench["measurements"]


def attached(bundle: Bundle, options: ValidateOptions) -> Attached:
    """Reads everything before the long work.

    Raises:
        UserError: a gate file or a bench that cannot be read, unknown names in it, a bench of another model.
    """
    from validate.measured import known

    gates = () if options.gate is None else read_gates(options.gate, "validate", known())
    bench = None if options.bench is None else read_bench(options.bench, bundle.manifest)
    bench_gates: tuple[Gate, ...] = ()
    if options.gate is not None and bench is not None and has_table(options.gate, "bench"):
        bench_gates = read_gates(options.gate, "bench", known_measurements(bundle.manifest.spec))
    fusion, why = _fusion(bundle)
    return Attached(gates, bench_gates, bench, fusion, why, bundle.manifest)


def read_bench(path: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The JSON that ``wan-trt bench`` printed last or wrote to a file.

    Raises:
        UserError: no such file, something else in it, or a bench of another model or precision.
    """
    remedy = "make one with wan-trt bench --json"
    try:
        found = json.loads(path.read_text(encoding="utf-8").strip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON in its last line"
        raise UserError(f"bench {path}: {reason}", "the JSON of a bench", remedy) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "measurements" not in found:
        raise UserError(f"bench {path}: not what a bench writes", FORMAT, remedy)
    theirs, ours = (found.get("model"), found.get("precision")), (manifest.spec.name, str(manifest.precision))
    if theirs != ours:
        raise UserError(f"bench {path}: {theirs[0]} in {theirs[1]}", f"{ours[0]} in {ours[1]}", "bench this bundle")
    return found


def _fusion(bundle: Bundle) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """What the compiler made of the graphs, or why there is nothing to show."""
    from engines.inspection import inspect_engines

    build = bundle.manifest.build
    if build is None:
        return (), "A bundle of graphs: nothing is compiled yet."
    if build.backend == "onnxruntime":
        return (), "ONNX Runtime compiles when it loads a graph: there are no kernels to list."
    try:
        return tuple(report.summary() for report in inspect_engines(bundle.folder)), ""
    except UserError as error:
        return (), str(error)
