"""ONNX bundle → engine bundle for one target."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from wan22.bundle import Build, Bundle, Component, File, open_bundle, refuse_existing, staged, write_manifest
from wan22.errors import UserError
from wan22.progress import Progress, silent
from wan22.specs import Precision

CPU_PRECISIONS = (Precision.FP32, Precision.FP16)  # ONNX Runtime has no bfloat16 or FP8 matrix kernels on CPU


@dataclass(frozen=True)
class BuildOptions:
    target: str = "cpu"
    overwrite: bool = False
    command: str = field(default="engines.build_engines(...)", compare=False)  # recorded in the manifest


def build_engines(
    bundle: Path, folder: Path, options: BuildOptions | None = None, progress: Progress = silent
) -> Bundle:
    """Builds every component of the ONNX bundle at ``bundle`` and writes the engine bundle ``folder``.

    Raises:
        UserError: no or another bundle, a target that cannot do its precision. Nothing is left behind then.
    """
    options = options or BuildOptions()
    refuse_existing(folder, overwrite=options.overwrite)
    source = open_bundle(bundle, "graphs", full_check=True)
    if options.target != "cpu":
        raise UserError(f"target {options.target!r}", "cpu", "use --target cpu")
    with staged(folder, overwrite=options.overwrite) as temporary:
        build = _build_onnxruntime(source, temporary, progress)
        manifest = replace(source.manifest, kind="engines", command=options.command, build=build)
        write_manifest(temporary, manifest)
    return Bundle(folder, manifest)


def _build_onnxruntime(source: Bundle, folder: Path, progress: Progress) -> Build:
    """ONNX Runtime compiles at load: the engine is the graph, proven to load here, beside the same weights."""
    import onnxruntime

    started = time.perf_counter()
    for component in source.manifest.components:
        _check_cpu_precision(component)
    _place(source, folder, source.manifest.files().values())
    for done, component in enumerate(source.manifest.components, 1):
        onnxruntime.InferenceSession(folder / component.graph.path, providers=["CPUExecutionProvider"])
        progress("build engines", done, len(source.manifest.components), "components")
    return Build(
        target="cpu",
        backend="onnxruntime",
        backend_version=onnxruntime.__version__,
        compute_capability="",
        profiles=(),
        options={},
        seconds=round(time.perf_counter() - started, 3),
    )


def _check_cpu_precision(component: Component) -> None:
    if component.precision not in CPU_PRECISIONS:
        raise UserError(
            f"{component.name} in {component.precision}",
            " or ".join(CPU_PRECISIONS) + " for target cpu, where ONNX Runtime has no such kernels",
            "export with --precision fp32",
        )


def _place(source: Bundle, folder: Path, files: Iterable[File]) -> None:
    """Copies ``files`` of the ONNX bundle; ONNX's own checker takes weights with a second hard link for an attack."""
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(file), target)
