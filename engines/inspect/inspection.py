"""``wan-trt inspect``: the fused kernels of existing engines, or of a bundle as compiled for a target.

Existing engines are described by the builder's log next to them or, on a machine with a GPU, by TensorRT's inspector. A
bundle is compiled for inspection, with three blocks per transformer because all blocks are alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.gpu.tensorrt_backend import EngineOptions, build_engine, load_module, log_beside
from engines.inspect.first_blocks import first_blocks
from engines.inspect.log import parse, read_log
from engines.inspect.report import FusionReport
from engines.profiles import profile_between, profiles_for
from engines.targets import Target, check_bundle, target_named
from wan22.backends import runs_graphs
from wan22.bundle import Bundle, open_bundle
from wan22.component import Component, File
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.onnx_file import check_graphs
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec

BLOCKS_TO_COMPILE = 3  # a first, a last and one in between


def inspect_engines(folder: Path, components: Sequence[str] = ()) -> list[FusionReport]:
    """A report for each engine of the bundle at ``folder``; ``components`` selects engines, empty means all.

    Raises:
        UserError: not an engine bundle, or one for ONNX Runtime, which does not generate kernels.
    """
    bundle = open_bundle(folder, "engines")
    build = bundle.manifest.build
    if build is None or runs_graphs(build.backend):
        remedy = "inspect the ONNX bundle with --target"
        raise UserError(f"{folder} has engines for ONNX Runtime", "TensorRT engines", remedy)
    target, reports = target_named(build.target), []
    layers = _layers(bundle.manifest.spec)
    for component in _each_once(_select(bundle, components)):
        plan, weights = bundle.path(component.graph), "in a file" if component.weights else "embedded"
        if log_beside(plan).is_file():
            compiled = read_log(log_beside(plan))
        else:
            compiled = parse(_query_inspector(load_module(target.backend), plan), str(plan))
        blocks = layers.get(component.name.partition(".")[0], 0) if "." in component.name else 0
        reports.append(FusionReport(component.name, target, compiled, component.precision, weights, blocks))
    return reports


def _each_once(components: Sequence[Component]) -> list[Component]:
    """The components; of experts in stages, the stages that they share."""
    found: dict[File, Component] = {}
    for component in components:
        for part in component.compiled():
            found.setdefault(part.graph if component.in_stages else File(part.name, "", 0), part)
    return list(found.values())


def _select(bundle: Bundle, names: Sequence[str]) -> list[Component]:
    return [bundle.component(name) for name in names] or list(bundle.manifest.components)


def inspect_bundle(
    folder: Path,
    target: str,
    video: tuple[str | None, str | None] = (None, None),
    components: Sequence[str] = (),
    progress: Progress = silent,
) -> list[FusionReport]:
    """Compile the graphs of the ONNX bundle at ``folder`` for ``target`` and report on them; the engines are discarded.

    Args:
        folder: an ONNX bundle.
        target: a name of :mod:`engines.targets`, or "auto".
        video: ``--size`` and ``--frames`` for :func:`engines.profiles.profiles_for`.
        components: the components to inspect; empty means all.
        progress: receives the builder's steps.

    Raises:
        UserError: the bundle, a component or the target does not exist, or a graph does not compile.
    """
    bundle, aim = open_bundle(folder, "graphs"), target_named(target)
    if runs_graphs(aim.backend):
        expected = "a GPU target: ONNX Runtime has no kernels to show"
        raise UserError(f"target {aim.name}", expected, "choose one with --target")
    chosen = _select(bundle, components)
    check_graphs(bundle)
    check_bundle(aim, replace(bundle.manifest, components=tuple(chosen)))
    return [_inspect(bundle, component, aim, video, progress) for component in chosen]


def _inspect(
    bundle: Bundle, component: Component, target: Target, video: tuple[str | None, str | None], progress: Progress
) -> FusionReport:
    spec, fixed = bundle.manifest.spec, bundle.manifest.size
    profile = profiles_for(spec, *video)[0] if fixed is None else profile_between(spec, fixed, fixed)
    options = EngineOptions(target, (profile,), component.inputs)
    with scratch_folder("inspect") as temporary:
        graph = first_blocks(bundle.path(component.graph), temporary, BLOCKS_TO_COMPILE)
        built = build_engine(graph, temporary / f"{component.name}.plan", options, progress)
        compiled = read_log(built.log)
    of_model = _layers(spec).get(component.name, 0)
    return FusionReport(component.name, target, compiled, component.precision, "embedded", of_model)


def _layers(spec: ModelSpec) -> dict[str, int]:
    """Blocks of every component that has some."""
    return dict.fromkeys(spec.experts, spec.dit.layers) | {"text_encoder": spec.text_encoder.layers}


def _query_inspector(trt: Any, plan: Path) -> str:
    """The output of TensorRT's inspector for an engine without a log; it needs the engine's GPU."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise UserError(f"{plan} has no builder log", "the log or the engine's GPU", "run wan-trt build again")
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
    return text if "Layers:\n" in text else f"Layers:\n{text}"
