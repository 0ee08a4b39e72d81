"""Attachments of a report: the bundle, a bench, the compiler's kernels, and the gates on all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.result import known_measurements, read_bench
from validate.gate import Gate, has_table, read_gates
from validate.options import ValidateOptions
from wan22.backends import runs_graphs
from wan22.bundle import Bundle, Manifest
from wan22.errors import UserError
from wan22.specs import ModelSpec


@dataclass(frozen=True)
class Attachments:
    gates: tuple[Gate, ...] = ()  # on the measurements of a validation
    bench_gates: tuple[Gate, ...] = ()  # judged only if there is a bench
    bench: Mapping[str, Any] | None = None  # the JSON of ``wan-trt bench``
    fusion: tuple[Mapping[str, Any], ...] = ()  # one summary per engine, as in ``wan-trt inspect --json``
    why_no_fusion: str = ""
    manifest: Manifest | None = None

    @property
    def not_judged(self) -> str:
        """Names the gates that this report cannot judge; empty if it judges all."""
        if self.bench is not None or not self.bench_gates:
            return ""
        return f"{len(self.bench_gates)} of [bench] not judged, no --bench given"


def read_attachments(bundle: Bundle, options: ValidateOptions) -> Attachments:
    """Read all attachments before the long work starts.

    Raises:
        UserError: a gate file or bench is unreadable or has unknown names, or the bench is of another model.
    """
    manifest = bundle.manifest
    bench = None if options.bench is None else _bench_of(options.bench, manifest)
    gates = () if options.gate is None else _gates(options.gate, manifest.spec, with_bench=bench is not None)
    fusion, why = _fusion(bundle)
    return Attachments(*(gates or ((), ())), bench, fusion, why, manifest)


def _gates(path: Path, spec: ModelSpec, *, with_bench: bool) -> tuple[tuple[Gate, ...], tuple[Gate, ...]]:
    """The gates of both tables. All names are checked, even those that this run does not judge."""
    from validate.report.worst import known

    of_bench: tuple[Gate, ...] = ()
    if has_table(path, "bench"):
        of_bench = read_gates(path, "bench", known_measurements(spec))
    if with_bench and of_bench and not has_table(path, "validate"):
        return (), of_bench
    return read_gates(path, "validate", known()), of_bench


def _bench_of(path: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Read the JSON that ``wan-trt bench`` printed or wrote.

    Raises:
        UserError: the file is missing, is not a bench, or is of another model, precision or target.
    """
    found, build = read_bench(path), manifest.build
    measured = [found["model"], found["precision"]]
    ours = [manifest.spec.name, manifest.precision_text]
    if build is not None:  # a bundle of graphs accepts a bench of any engines built from it
        measured.append(found["conditions"].get("target"))
        ours.append(build.target)
    if measured != ours:
        raise UserError(f"bench {path}: of {_describe(measured)}", _describe(ours), "bench this bundle")
    return found


def _describe(facts: Sequence[Any]) -> str:
    return " in ".join(map(str, facts[:2])) + "".join(f" for {target}" for target in facts[2:])


def _fusion(bundle: Bundle) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """The summaries of the compiled engines, or the reason why there are none."""
    from engines.inspect.inspection import inspect_engines

    build = bundle.manifest.build
    if build is None:
        return (), "A bundle of graphs: nothing is compiled yet."
    if runs_graphs(build.backend):
        return (), "ONNX Runtime compiles when it loads a graph: there are no kernels to list."
    try:
        return tuple(report.summary() for report in inspect_engines(bundle.folder)), ""
    except UserError as error:
        return (), str(error)
