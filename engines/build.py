"""ONNX bundle → engine bundle for one target."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from engines.block_build import BlockBuild, check_groups, groups_of
from engines.cpu.onnxruntime_backend import fit_components
from engines.cuda.attention import OLDEST_ONNXRUNTIME
from engines.cuda.components import fit_for_cuda
from engines.disk_space import disk_bytes
from engines.gpu.tensorrt_backend import EngineOptions, build_engine, keep_log, load_module
from engines.load_check import check_loads
from engines.profiles import profile_between, profiles_for, with_stages, with_strips
from engines.targets import Target, check_bundle, target_named
from wan22.backends import runs_graphs
from wan22.bundle import Build, Bundle, Manifest, file_entry, open_bundle, refuse_existing, staged, write_manifest
from wan22.component import Component, File, Stage, Tensor
from wan22.errors import UserError
from wan22.memory import peak_rss_bytes
from wan22.onnx_file import check_graphs
from wan22.outputs import check_disk, check_no_source
from wan22.progress import Progress, silent
from wan22.quantities import video_text
from wan22.shapes import Profile, own_profiles
from wan22.stamp import Stamp

RANKS = range(16, 513, 16)  # of slots for LoRAs: compilers want aligned matrices
Topology = Literal["whole", "blocks"]  # a transformer as one engine, or as stages that every block calls
USUAL_STRIPS = 8  # that a VAE beside blocks is built for: 720p in fp16 then takes less than 4 GiB


@dataclass(frozen=True)
class BuildOptions:
    target: str = "cpu"  # a name of engines.targets, or "auto"
    # shapes; by default those of the model's default video, or of graphs with fixed shapes
    size: str | None = None  # "832x480", several with commas, a range "480x480..1280x720", or a preset
    frames: str | None = None  # "81" or "5..81"
    # TensorRT
    tf32: bool = False
    timing_cache: Path | None = None
    topology: Topology | None = None  # by default blocks for TensorRT where all blocks compute alike, else whole
    vae_strips: int | None = None  # the VAE in stages, for pictures in up to so many strips; by default in blocks
    # transformers in blocks
    parallel: str | None = None  # "ulysses4", several with commas: for devices that divide the tokens
    lora_slots: int | None = None  # the rank of LoRAs that requests bring, beside every linear of a block
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
    usual = default_topology(target, source.manifest) if options.lora_slots is None else "blocks"
    options = replace(options, topology=options.topology or usual)
    in_stages = all(component.stages for component in source.manifest.components if component.name[:3] == "vae")
    if options.parallel is not None:
        check_groups(source.manifest.spec, options.parallel, in_blocks=options.topology == "blocks")
    if options.vae_strips is not None and not in_stages:
        raise UserError(f"--vae-strips for {bundle}", "a VAE in stages", "export again, without fixed shapes")
    profiles, strips = _profiles(source.manifest, target, options, in_stages)
    options = replace(options, vae_strips=strips)
    check_graphs(source)
    if not runs_graphs(target.backend):
        load_module(target.backend, [component.precision.linears for component in source.manifest.components])
    again = f"export again: {source.manifest.command}"
    check_loads(target, _graphs(source, target, options), again)
    check_disk(folder, disk_bytes(source.manifest, target, in_blocks=options.topology == "blocks"))
    started = time.perf_counter()
    with staged(folder, overwrite=options.overwrite) as temporary:
        if runs_graphs(target.backend):
            compiled = _fit_graphs(source, temporary, target, options, progress)
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


def default_topology(target: Target, manifest: Manifest) -> Topology:
    """``blocks`` for TensorRT, if the bundle of ``manifest`` has stages of its transformers."""
    experts = [component for component in manifest.components if component.name in manifest.spec.experts]
    in_stages = bool(experts) and all(component.stages for component in experts)
    return "blocks" if in_stages and not runs_graphs(target.backend) else "whole"


@dataclass(frozen=True)
class _Compiled:
    components: tuple[Component, ...]
    version: str  # of the backend
    attention_scales: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)  # for CUDA, by component


def _fit_graphs(source: Bundle, folder: Path, target: Target, options: BuildOptions, progress: Progress) -> _Compiled:
    """Copy the graphs and adapt them to the kernels of ONNX Runtime on a CPU or a GPU."""
    manifest, in_blocks = source.manifest, options.topology == "blocks"

    def place(graph: Path, _component: Component, stage: Stage) -> File:
        shutil.copyfile(graph, folder / stage.graph.path)
        return file_entry(folder, folder / stage.graph.path)

    blocks = BlockBuild(source, folder, progress, place, groups_of(options.parallel), options.lora_slots)
    if in_blocks:
        blocks.check()
    whole = [
        replace(c, stages=()) if blocks.applies_to(c) else c
        for c in manifest.components
        if not (in_blocks and blocks.applies_to(c))
    ]
    rest = replace(source, manifest=replace(manifest, components=tuple(whole)))
    _place(source, folder, rest.manifest.files().values())
    if target.backend == "onnxruntime":
        made, version = fit_components(rest, folder, progress)
        by_name = {component.name: component for component in made}
        every = tuple(by_name.get(c.name) or blocks.component(c) for c in manifest.components)
        return _Compiled(every, version, blocks.attention_scales if in_blocks else {})
    fitted = fit_for_cuda(rest, folder, progress)
    oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
    nodes = {component.name: listed for component, listed in fitted}
    return _Compiled(tuple(component for component, _ in fitted), oldest, nodes=nodes)


def _recorded_options(target: Target, options: BuildOptions) -> dict[str, str]:
    """The options that change the engines, for the manifest."""
    slots = {} if options.lora_slots is None else {"lora_slots": str(options.lora_slots)}
    asked = ({"parallel": options.parallel} if options.parallel else {}) | slots
    if runs_graphs(target.backend):
        return ({"topology": options.topology} if options.topology == "blocks" else {}) | asked
    strips = {} if options.vae_strips is None else {"vae_strips": str(options.vae_strips)}
    return {"tf32": str(options.tf32).lower(), "topology": str(options.topology)} | strips | asked


def _check_options(target: Target, options: BuildOptions) -> None:
    if (rank := options.lora_slots) is not None:
        if rank % RANKS.step or rank not in RANKS:
            expected = f"a multiple of {RANKS.step} from {RANKS[0]} to {RANKS[-1]}"
            raise UserError(f"--lora-slots {rank}", expected, "take the largest rank of your LoRAs, rounded up")
        if options.topology == "whole" or target.backend == "onnxruntime-gpu":
            found = "with --topology whole" if options.topology == "whole" else f"for target {target.name}"
            raise UserError(f"--lora-slots {found}", "engines in blocks", "leave one out")
    if options.topology == "blocks" and target.backend == "onnxruntime-gpu":
        raise UserError(f"--topology blocks for target {target.name}", "cpu or a TensorRT target", "leave it out")
    if options.vae_strips is not None and runs_graphs(target.backend):
        found = f"--vae-strips for target {target.name}"
        raise UserError(found, "a TensorRT target", "leave it out: its engines take any number of strips")
    if options.tf32 and runs_graphs(target.backend):
        raise UserError(f"--tf32 for target {target.name}", "a TensorRT target", "leave it out")
    if options.timing_cache is not None and target.backend != "tensorrt":
        found = f"--timing-cache for {target.name}, whose backend {target.backend} has no timing cache"
        raise UserError(found, "a TensorRT target, such as h100", "leave it out")


def _profiles(
    manifest: Manifest, target: Target, options: BuildOptions, vae_in_stages: bool
) -> tuple[tuple[Profile, ...], int | None]:
    """The shapes to compile engines for, and the most strips of a VAE in stages; nothing for ONNX Runtime."""
    asked = options.size is not None or options.frames is not None
    if runs_graphs(target.backend):
        if asked:
            found = f"--size or --frames for target {target.name}"
            raise UserError(found, "neither", "its engines take every size; leave them out")
        return (), None
    blocks, groups, strips = options.topology == "blocks", groups_of(options.parallel), options.vae_strips
    if manifest.size is None:
        several = profiles_for(manifest.spec, options.size, options.frames)
        if strips is None and blocks and vae_in_stages:
            strips = min(USUAL_STRIPS, *(max(profile["height"][0], profile["width"][0]) for profile in several))
        if strips is not None:  # those that nobody asked for are the exception: kernels are chosen for whole pictures
            usual = options.vae_strips or 1
            several = tuple(with_strips(profile, manifest.spec.vae, strips, usual) for profile in several)
        return (tuple(with_stages(each, groups) for each in several) if blocks else several), strips
    if asked:
        expected = f"neither: the graphs are fixed to {video_text(*manifest.size)}"
        raise UserError("--size or --frames", expected, "export without fixed shapes")
    fixed = profile_between(manifest.spec, manifest.size, manifest.size)
    return ((with_stages(fixed, groups) if blocks else fixed),), strips


def _in_stages(component: Component, options: BuildOptions) -> bool:
    """True if the stages of ``component`` are compiled, not its whole graph."""
    if component.name.startswith("vae"):
        return options.vae_strips is not None
    return options.topology == "blocks" and bool(component.stages)


def _graphs(source: Bundle, target: Target, options: BuildOptions) -> list[Path]:
    """The graphs that a build compiles, each once."""
    found: dict[Path, None] = {}
    for component in source.manifest.components:
        in_stages, on_graphs = _in_stages(component, options), runs_graphs(target.backend)
        stages = component.stages if in_stages or (on_graphs and component.name.startswith("vae")) else ()
        stages = tuple(stage for stage in stages if stage.groups in (1, *groups_of(options.parallel)))
        found |= dict.fromkeys(source.path(stage.graph) for stage in stages)
        if not in_stages:
            found[source.path(component.graph)] = None
    return list(found)


def _place(source: Bundle, folder: Path, files: Iterable[File]) -> None:
    """Copy ``files`` of the ONNX bundle. Hard links would not do: ONNX's checker rejects weights with two names."""
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(file), target)


# -- TensorRT and TensorRT-RTX


def _compile_tensorrt(
    source: Bundle,
    folder: Path,
    asked: tuple[Target, tuple[Profile, ...], BuildOptions],
    logs: Path,
    progress: Progress,
) -> _Compiled:
    """Build one plan per component or, in blocks, per stage, with the builder's log beside.

    The log of a failed build goes to the folder ``logs``.
    """
    target, profiles, options = asked
    version = str(load_module(target.backend).__version__)
    _place(source, folder, source.manifest.tokenizer)

    def settings(component: Component, inputs: tuple[Tensor, ...]) -> EngineOptions:
        stamp = Stamp(target.name, component.precision, own_profiles(profiles, inputs))
        return EngineOptions(target, tuple(profiles), inputs, options.tf32, options.timing_cache, stamp.name)

    def compile_stage(graph: Path, component: Component, stage: Stage) -> File:
        plan = folder / Path(stage.graph.path).with_suffix(".plan")
        with keep_log(plan, logs):
            build_engine(graph, plan, settings(component, stage.inputs), progress)
        return file_entry(folder, plan)

    in_blocks, groups = options.topology == "blocks", groups_of(options.parallel)
    blocks = BlockBuild(source, folder, progress, compile_stage, groups, options.lora_slots, target)
    if in_blocks:
        blocks.check()
    compiled: list[Component] = []
    built: dict[str, File] = {}  # stages of the VAE, which its graphs share
    for done, component in enumerate(source.manifest.components, 1):
        if in_blocks and blocks.applies_to(component):
            compiled.append(blocks.component(component))
        elif _in_stages(component, options):
            for stage in component.stages:
                path = stage.graph.path
                built[path] = built.get(path) or compile_stage(source.path(stage.graph), component, stage)
            stages = tuple(replace(stage, graph=built[stage.graph.path]) for stage in component.stages)
            compiled.append(replace(component, graph=stages[-1].graph, weights=(), stages=stages))
        else:
            plan = folder / f"{component.name}.plan"
            with keep_log(plan, logs):
                build_engine(source.path(component.graph), plan, settings(component, component.inputs), progress)
            compiled.append(replace(component, graph=file_entry(folder, plan), weights=(), stages=()))
        progress("build engines", done, len(source.manifest.components), "components")
    return _Compiled(tuple(compiled), version, blocks.attention_scales if in_blocks else {})
