"""Adapt the components of a bundle to ONNX Runtime's CUDA provider, and prove that all of their nodes have kernels."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines.cuda.kernels import check_kernels
from engines.cuda.passes import fit_transformer, lower_opset
from wan22.bundle import Bundle, file_entry
from wan22.component import Component, File
from wan22.progress import Progress
from wan22.specs import ModelSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def fit_for_cuda(source: Bundle, folder: Path, progress: Progress) -> list[tuple[Component, str]]:
    """Rewrite the components of ``source``, already copied to ``folder``.

    Returns:
        Each component with its nodes, such as "24 Gemm BFLOAT16, 4 Attention BFLOAT16".

    Raises:
        UserError: a node has no CUDA kernel, or attention was not fused.
    """
    import onnx_ir as ir

    components, fitted, stages = source.manifest.components, [], dict[str, File]()  # stages of the VAE by path
    for done, component in enumerate(components, 1):
        path = folder / component.graph.path
        model = ir.load(path)
        nodes = _fit(model, source.manifest.spec, component.name)
        ir.save(model, path)
        listed = ", ".join(f"{count} {kind}" for kind, count in nodes.items())
        for place in {stage.graph.path for stage in component.stages} - stages.keys():
            model = ir.load(folder / place)
            _fit(model, source.manifest.spec, component.name)
            ir.save(model, folder / place)
            stages[place] = file_entry(folder, folder / place)
        own = tuple(replace(stage, graph=stages[stage.graph.path]) for stage in component.stages)
        fitted.append((replace(component, graph=file_entry(folder, path), stages=own), listed))
        progress("build engines", done, len(components), "components")
    return fitted


def _fit(model: "ir.Model", spec: ModelSpec, name: str) -> dict[str, int]:
    if name in spec.experts:
        fit_transformer(model, spec.dit, name)
    elif name.startswith("vae"):
        lower_opset(model)
    return check_kernels(model, name)
