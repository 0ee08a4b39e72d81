"""An ONNX bundle as a pipeline on the CPU, before any engine is built: what its numbers are, whatever its precision.

ONNX Runtime's CPU kernels compute float32 and float16 graphs. It has none for bfloat16, so a graph that keeps 16 bits
in bfloat16, FP8 ones included, is rewritten for it: :mod:`engines.cpu.emulation` rounds at every edge that the compiled
graph would keep in fewer bits. Whoever shows a number says which way it was made.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from runtime.engine import Engine
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.pipeline import Pipeline
from validate.ladder.polygraphy_files import RecordingPipeline
from wan22.backends import loading
from wan22.bundle import Build, Component, Manifest, kind_of, open_bundle
from wan22.specs import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

BY_KERNELS = "computed by kernels"
BY_ROUNDING = "emulated by rounding"
WITH_KERNELS = (Precision.FP32, Precision.FP16)  # of ONNX Runtime on the CPU


def open_for_comparison(folder: Path, calls: Path | None = None) -> Pipeline:
    """The pipeline of the engines at ``folder``, or of the graphs there; first calls are written into ``calls``.

    Raises:
        UserError: no bundle there, or not as its manifest says.
    """
    engines = kind_of(folder) == "engines"
    bundle = open_bundle(folder, "engines" if engines else "graphs")
    new_engine = None if engines else partial(_engine, folder)
    if calls is None:
        return Pipeline(bundle, keep_experts=False, new_engine=new_engine)
    return RecordingPipeline(bundle, calls, keep_experts=False, new_engine=new_engine)


def how_made(manifest: Manifest) -> dict[str, str]:
    """``BY_KERNELS`` or ``BY_ROUNDING`` by component."""
    return {c.name: BY_ROUNDING if _emulated(manifest.build, c) else BY_KERNELS for c in manifest.components}


def _emulated(build: Build | None, component: Component) -> bool:
    return build is None and component.precision not in WITH_KERNELS


def _engine(folder: Path, component: Component) -> Engine:
    kind = EmulatedEngine if _emulated(None, component) else OnnxRuntimeEngine
    return kind(folder, component, (), ("CPUExecutionProvider",))


class EmulatedEngine(OnnxRuntimeEngine):
    """A graph with bfloat16 in it, computed in float32 and rounded; its weights stay where they are."""

    def __enter__(self) -> Self:
        import onnx_ir as ir

        from engines.cpu.emulation import emulate

        model = ir.load(self._path)
        emulate(model)
        self._session = _session(model, self._path.parent, self._providers)
        return self


def _session(model: "ir.Model", folder: Path, providers: Sequence[str]) -> Any:
    """``model`` goes in as bytes, its external weights are looked for in ``folder``."""
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    content = ir.serde.serialize_model(model).SerializeToString()
    with loading(folder):
        return onnxruntime.InferenceSession(content, options, providers=list(providers))
