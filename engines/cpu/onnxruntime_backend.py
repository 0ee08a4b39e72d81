"""Engines for ONNX Runtime, which compiles at load time: graphs adapted to its CPU kernels and test-loaded here."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines.cpu.passes import fit_decoder, fit_transformer
from engines.cpu.prompt import split_at_prompt
from wan22.backends import loading
from wan22.bundle import Bundle, file_entry
from wan22.component import Component, File, Stage
from wan22.precision import Precision
from wan22.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir


def fit_components(source: Bundle, folder: Path, progress: Progress) -> tuple[tuple[Component, ...], str]:
    """Rewrite the components of ``source``, already copied to ``folder``; return them and the backend's version."""
    import onnxruntime

    components, prepared, stages = source.manifest.components, [], dict[str, Stage]()
    for done, component in enumerate(components, 1):
        engine = _for_cpu(source, component, folder)
        new = {stage.graph.path: stage for stage in component.stages if stage.graph.path not in stages}
        stages |= {path: _stage_for_cpu(component, stage, folder) for path, stage in new.items()}
        prepared.append(engine := replace(engine, stages=tuple(stages[s.graph.path] for s in component.stages)))
        for file in (engine.graph, *engine.halves, *(stages[path].graph for path in new)):
            with loading(folder / file.path):
                onnxruntime.InferenceSession(folder / file.path, providers=["CPUExecutionProvider"])
        progress("build engines", done, len(components), "components")
    return tuple(prepared), str(onnxruntime.__version__)


def _for_cpu(source: Bundle, component: Component, folder: Path) -> Component:
    """The component adapted to CPU kernels if passes exist for it; the fused kernels have no 16-bit form."""
    spec, path = source.manifest.spec, folder / component.graph.path
    is_transformer, is_decoder = component.name in spec.experts, component.name.startswith("vae_decoder")
    if component.precision is not Precision.FP32 or not (is_transformer or is_decoder):
        return component
    import onnx_ir as ir

    model = ir.load(path)
    if is_transformer:
        fit_transformer(model, spec.dit)
    else:
        fit_decoder(model)
    ir.save(model, path)
    return replace(component, graph=file_entry(folder, path), halves=_halves(model, path) if is_transformer else ())


def _stage_for_cpu(component: Component, stage: Stage, folder: Path) -> Stage:
    """A stage of the VAE, adapted like its whole graph."""
    if component.precision is not Precision.FP32 or not component.name.startswith("vae_decoder"):
        return stage
    import onnx_ir as ir

    model = ir.load(path := folder / stage.graph.path)
    fit_decoder(model)
    ir.save(model, path)
    return replace(stage, graph=file_entry(folder, path))


def _halves(transformer: "ir.Model", path: Path) -> tuple[File, ...]:
    """Write the prompt-only part and the per-step part next to the complete transformer at ``path``."""
    import onnx_ir as ir

    paths = [path.with_suffix(f".{name}.onnx") for name in ("prompt", "step")]
    if (halves := split_at_prompt(transformer)) is None:
        return ()
    for half, target in zip(halves, paths, strict=True):
        ir.save(half, target)
    return tuple(file_entry(path.parent, target) for target in paths)
