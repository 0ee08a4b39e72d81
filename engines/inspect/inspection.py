"""``wan-trt inspect``: what was fused, of engines that exist, or of a bundle as it would be built for a target.

Engines are read from the log that the builder left beside them, or asked through TensorRT's inspector where there is a
GPU. A bundle is compiled to look at it, its transformers with three blocks only: all are alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.gpu.tensorrt_backend import EngineOptions, build_engine, load_module, log_beside
from engines.inspect.first_blocks import first_blocks
from engines.inspect.log import Compiled, parse, read_log
from engines.inspect.report import FusionReport
from engines.profiles import profile_between, profiles_for
from engines.targets import Target, check_bundle, target_named
from wan22.bundle import Bundle, Component, open_bundle
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.onnx_file import check_graphs
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec

BLOCKS_TO_LOOK_AT = 3  # a first, a last and one in between


def inspect_engines(folder: Path, components: Sequence[str] = ()) -> list[FusionReport]:
    """The reports of the engines of the bundle at ``folder``, of all ``components`` where none is named.

    Raises:
        UserError: no engine bundle, or one for ONNX Runtime, which has no kernels of its own.
    """
    bundle = open_bundle(folder, "engines")
    build = bundle.manifest.build
    if build is None or build.backend == "onnxruntime":
        remedy = "inspect the ONNX bundle with --target"
        raise UserError(f"{folder}: engines for the CPU", "engines of TensorRT", remedy)
    target = target_named(build.target)
    return [
        FusionReport(
            component.name,
            target,
            _compiled(bundle, component, target),
            component.precision,
            "external" if component.weights else "embedded",
        )
        for component in _chosen(bundle, components)
    ]


def _chosen(bundle: Bundle, names: Sequence[str]) -> list[Component]:
    return [bundle.component(name) for name in names] or list(bundle.manifest.components)


def inspect_bundle(
    folder: Path,
    target: str,
    video: tuple[str | None, str | None] = (None, None),
    components: Sequence[str] = (),
    progress: Progress = silent,
) -> list[FusionReport]:
    """Compiles the graphs of the ONNX bundle at ``folder`` for ``target`` and reports; nothing is kept.

    Args:
        folder: an ONNX bundle.
        target: a name of :mod:`engines.targets`, or "auto".
        video: ``--size`` and ``--frames`` as :func:`engines.profiles.profiles_for` takes them.
        components: which to look at; all of them where empty.
        progress: told the builder's steps.

    Raises:
        UserError: no such bundle, component or target, or a graph that does not compile.
    """
    bundle, aim = open_bundle(folder, "graphs"), target_named(target)
    if aim.backend == "onnxruntime":
        raise UserError(f"target {aim.name}", "a GPU: ONNX Runtime has no kernels to show", "name one with --target")
    chosen = _chosen(bundle, components)
    check_graphs(bundle)
    check_bundle(aim, replace(bundle.manifest, components=tuple(chosen)))
    return [_look_at(bundle, component, aim, video, progress) for component in chosen]


def _look_at(
    bundle: Bundle, component: Component, target: Target, video: tuple[str | None, str | None], progress: Progress
) -> FusionReport:
    manifest = bundle.manifest
    profiles = (
        profiles_for(manifest.spec, *video)
        if manifest.size is None
        else (profile_between(manifest.spec, manifest.size, manifest.size),)
    )
    options = EngineOptions(target, profiles[:1], component.inputs)
    with scratch_folder("inspect") as temporary:
        graph = first_blocks(bundle.path(component.graph), temporary, BLOCKS_TO_LOOK_AT)
        built = build_engine(graph, temporary / f"{component.name}.plan", options, progress)
        compiled = read_log(built.log)
    return FusionReport(
        component.name, target, compiled, component.precision, "embedded", _blocks(manifest.spec, component)
    )


def _blocks(spec: ModelSpec, component: Component) -> int:
    if component.name == "text_encoder":
        return spec.text_encoder.layers
    return spec.dit.layers if component.name in spec.experts else 0


def _compiled(bundle: Bundle, component: Component, target: Target) -> Compiled:
    plan = bundle.path(component.graph)
    if log_beside(plan).is_file():
        return read_log(log_beside(plan))
    return parse(_asked(load_module(target.backend), plan), str(plan))


def _asked(trt: Any, plan: Path) -> str:
    """What TensorRT's inspector says about an engine whose log is gone; it needs the GPU of the engine."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise UserError(f"no builder log beside {plan}", "it, or the GPU of the engine", "run wan-trt build again")
    told: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
    return told if "Layers:\n" in told else f"Layers:\n{told}"
