"""ONNX bundle → engine bundle for one target."""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from engines.cpu.onnxruntime_backend import fit_components
from engines.cuda.attention import OLDEST_ONNXRUNTIME
from engines.cuda.components import fit_for_cuda
from engines.gpu.external_build import ExternalBuild
from engines.gpu.tensorrt_backend import EngineOptions, build_engine, load_module, log_beside
from engines.load_check import check_loads
from engines.plan import kernel_bytes
from engines.profiles import profile_between, profiles_for
from engines.targets import Target, check_bundle, target_named
from wan22.backends import runs_graphs
from wan22.bundle import (
    Build,
    Bundle,
    Component,
    File,
    Manifest,
    check_disk,
    file_entry,
    open_bundle,
    refuse_existing,
    staged,
    write_manifest,
)
from wan22.errors import UserError
from wan22.inputs import check_no_source
from wan22.memory import peak_rss_bytes
from wan22.onnx_file import check_graphs
from wan22.progress import Progress, silent
from wan22.quantities import video_text
from wan22.residency import vae_weights_bytes
from wan22.shapes import Profile, own_profiles
from wan22.stamp import Stamp

Weights = Literal["embedded", "external"]  # compiled into the engine, or inputs of it


@dataclass(frozen=True)
class BuildOptions:
    target: str = "cpu"  # a name of engines.targets, or "auto"
    # shapes; by default those of the model's default video, or of graphs with fixed shapes
    size: str | None = None  # "832x480", several with commas, a range "480x480..1280x720", or a preset
    frames: str | None = None  # "81" or "5..81"
    # TensorRT
    tf32: bool = False
    timing_cache: Path | None = None
    weights: Weights = "embedded"
    # writing
    overwrite: bool = False
    command: str = field(default="engines.build_engines(...)", compare=False)  # recorded in the manifest


def build_engines(
    bundle: Path, folder: Path, options: BuildOptions | None = None, progress: Progress = silent
) -> Bundle:
    """Build every component of the ONNX bundle at ``bundle`` and write the engine bundle ``folder``.

    Raises:
        UserError: not an ONNX bundle, a target that does not support its precision or lacks its module, a size that the
            model does not support, a graph that does not compile. Only the builder's log is kept then.
    """
    options = options or BuildOptions()
    refuse_existing(folder, "engines", overwrite=options.overwrite)
    check_no_source(folder, bundle, options.timing_cache)
    target = target_named(options.target)
    source = open_bundle(bundle, "graphs", full_check=True)
    check_bundle(target, source.manifest)
    _check_options(target, options)
    profiles = _profiles(source.manifest, target, options)
    check_graphs(source)
    if not runs_graphs(target.backend):
        load_module(target.backend)
    again = f"export again: {source.manifest.command}"
    check_loads(target, [source.path(component.graph) for component in source.manifest.components], again)
    check_disk(folder, disk_bytes(source.manifest, target, options))
    started = time.perf_counter()
    with staged(folder, overwrite=options.overwrite) as temporary:
        if runs_graphs(target.backend):
            _place(source, temporary, source.manifest.files().values())
            compiled = _fit_graphs(source, temporary, target, progress)
        else:
            compiled = _compile_tensorrt(source, temporary, (target, profiles, options), folder.parent, progress)
        build = Build(
            target=target.name,
            backend=target.backend,
            backend_version=compiled.version,
            compute_capability=target.compute_capability,
            profiles=profiles,
            options=_recorded_options(target, options),
            seconds=round(time.perf_counter() - started, 3),
            peak_rss_bytes=peak_rss_bytes(),
            attention_scales=compiled.attention_scales,
            nodes=compiled.nodes,
        )
        command, components = options.command, compiled.components
        manifest = replace(source.manifest, kind="engines", command=command, build=build, components=components)
        write_manifest(temporary, manifest)
    return Bundle(folder, manifest)


def disk_bytes(manifest: Manifest, target: Target, options: BuildOptions) -> int:
    """The size of the engines built from the ONNX bundle of ``manifest``: weights, kernels and the builder's logs."""
    files, spec = manifest.files().values(), manifest.spec
    if runs_graphs(target.backend):  # copies, plus two graphs per transformer
        return sum(file.size_bytes for file in files) + 2 * sum(c.graph.size_bytes for c in manifest.components)
    shared = options.weights == "external"
    total = float(sum(file.size_bytes for file in manifest.tokenizer))
    for component in manifest.components:
        alone = not shared or component.name not in spec.experts[1:]
        total += kernel_bytes(spec, component.name) if alone else 0.0
        if component.name.startswith("vae"):  # both graphs store a copy of the weights that they use
            total += vae_weights_bytes(spec.vae, component.name, component.precision)
        else:
            total += sum(file.size_bytes for file in component.weights)
    return int(total)


@dataclass(frozen=True)
class _Compiled:
    components: tuple[Component, ...]
    version: str  # of the backend
    attention_scales: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)  # for CUDA, by component


def _fit_graphs(source: Bundle, folder: Path, target: Target, progress: Progress) -> _Compiled:
    """Adapt the graphs, already copied to ``folder``, to the kernels of ONNX Runtime on a CPU or a GPU."""
    if target.backend == "onnxruntime":
        return _Compiled(*fit_components(source, folder, progress))
    fitted = fit_for_cuda(source, folder, progress)
    oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
    nodes = {component.name: listed for component, listed in fitted}
    return _Compiled(tuple(component for component, _ in fitted), oldest, nodes=nodes)


def _recorded_options(target: Target, options: BuildOptions) -> dict[str, str]:
    """The options that change the engines, for the manifest."""
    if runs_graphs(target.backend):
        return {}
    return {"tf32": str(options.tf32).lower(), "weights": options.weights}


def _check_options(target: Target, options: BuildOptions) -> None:
    if options.weights == "external" and runs_graphs(target.backend):
        raise UserError(f"--weights external for target {target.name}", "a TensorRT target", "leave it out")
    if options.timing_cache is not None and target.backend != "tensorrt":
        found = f"--timing-cache for {target.name}, whose backend {target.backend} has no timing cache"
        raise UserError(found, "a TensorRT target, such as h100", "leave it out")


def _profiles(manifest: Manifest, target: Target, options: BuildOptions) -> tuple[Profile, ...]:
    """The shapes to compile engines for; none for ONNX Runtime, which takes any."""
    asked = options.size is not None or options.frames is not None
    if runs_graphs(target.backend):
        if asked:
            found = f"--size or --frames for target {target.name}"
            raise UserError(found, "neither", "its engines take every size; leave them out")
        return ()
    if manifest.size is None:
        return profiles_for(manifest.spec, options.size, options.frames)
    if asked:
        fixed = video_text(*manifest.size)
        raise UserError(
            "--size or --frames", f"neither: the graphs are fixed to {fixed}", "export without fixed shapes"
        )
    return (profile_between(manifest.spec, manifest.size, manifest.size),)


def _place(source: Bundle, folder: Path, files: Iterable[File]) -> None:
    """Copy ``files`` of the ONNX bundle. Hard links would not do: ONNX's checker rejects weights with two names."""
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(file), target)


# -- TensorRT and TensorRT-RTX


def _engine_options(
    component: Component, target: Target, profiles: tuple[Profile, ...], options: BuildOptions
) -> EngineOptions:
    stamp = Stamp(target.name, component.precision, own_profiles(profiles, component.inputs))
    return EngineOptions(target, profiles, component.inputs, options.tf32, options.timing_cache, stamp.name)


def _compile_tensorrt(
    source: Bundle,
    folder: Path,
    asked: tuple[Target, Sequence[Profile], BuildOptions],
    logs: Path,
    progress: Progress,
) -> _Compiled:
    """Build one plan per component, or per graph if weights are external, with the builder's log next to it.

    The log of a failed build goes to the folder ``logs``.
    """
    target, profiles, options = asked
    version = str(load_module(target.backend).__version__)
    _place(source, folder, source.manifest.tokenizer)
    components = source.manifest.components
    compiled, external = [], ExternalBuild(source, folder, progress)
    scales: dict[str, float] = {}
    if options.weights == "external":
        external.check()
        scales = external.attention_scales
    for done, component in enumerate(components, 1):
        outside = options.weights == "external" and external.applies_to(component)
        plan = external.plan(component) if outside else folder / f"{component.name}.plan"
        settings = _engine_options(component, target, tuple(profiles), options)
        try:
            if outside:
                compiled.append(external.component(component, settings))
            else:
                build_engine(source.path(component.graph), plan, settings, progress)
                compiled.append(replace(component, graph=file_entry(folder, plan), weights=()))
        except UserError:
            if log_beside(plan).exists():
                shutil.copyfile(log_beside(plan), logs / f"{component.name}.build.log")
            raise
        progress("build engines", done, len(components), "components")
    return _Compiled(tuple(compiled), version, scales)
