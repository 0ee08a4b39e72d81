"""An ONNX bundle as a pipeline on the CPU, in any precision, before an engine is built.

ONNX Runtime's CPU kernels compute float32 and float16 graphs. They do not support bfloat16, so a graph that keeps
values in bfloat16 (FP8 graphs do) is rewritten: :mod:`engines.cpu.emulation` rounds at every edge that the compiled
graph would keep in fewer bits. Reports state which of the two ways produced a number.
"""

from functools import partial
from pathlib import Path
from typing import Self

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.engine import Engine
from runtime.engine_onnxruntime import OnnxRuntimeEngine
from runtime.pipeline import Pipeline
from validate.ladder.polygraphy_files import RecordingPipeline
from wan22.backends import loading
from wan22.bundle import Build, Manifest, kind_of, open_bundle
from wan22.component import Component
from wan22.onnx_file import check_graphs
from wan22.precision import Precision
from wan22.residency import ONE_EXPERT, ResidencyChoice

BY_KERNELS = "computed by kernels"
BY_ROUNDING = "emulated by rounding"
WITH_KERNELS = (Precision.FP32, Precision.FP16)  # precisions that ONNX Runtime's CPU kernels support


def open_for_comparison(
    folder: Path,
    calls: Path | None = None,
    residency: ResidencyChoice = "auto",
    blocks: BlockOptions = BLOCKS_AS_FIT,
) -> Pipeline:
    """Open the engines or the graphs at ``folder``; ``calls`` receives the first call of each.

    The reference needs memory too, so ``auto`` keeps one expert at most.

    Raises:
        UserError: there is no bundle, or it does not match its manifest.
    """
    engines = kind_of(folder) == "engines"
    bundle = open_bundle(folder, "engines" if engines else "graphs")
    check_graphs(bundle)
    new_engine = None if engines else partial(_engine, folder)
    if calls is None:
        return Pipeline(bundle, residency=residency, choices=ONE_EXPERT, new_engine=new_engine, blocks=blocks)
    return RecordingPipeline(
        bundle, calls, residency=residency, choices=ONE_EXPERT, new_engine=new_engine, blocks=blocks
    )


def how_made(manifest: Manifest) -> dict[str, str]:
    """How each component's numbers are made, ``BY_KERNELS`` or ``BY_ROUNDING``, by component."""
    return {c.name: BY_ROUNDING if _needs_emulation(manifest.build, c) else BY_KERNELS for c in manifest.components}


def _needs_emulation(build: Build | None, component: Component) -> bool:
    return build is None and component.precision not in WITH_KERNELS


def _engine(folder: Path, component: Component) -> Engine:
    kind = EmulatedEngine if _needs_emulation(None, component) else OnnxRuntimeEngine
    return kind(folder, component, (), ("CPUExecutionProvider",))


class EmulatedEngine(OnnxRuntimeEngine):
    """A graph that uses bfloat16, computed in float32 with rounding; its weights stay in their files."""

    def __enter__(self) -> Self:
        import onnx_ir as ir
        import onnxruntime

        from engines.cpu.emulation import emulate

        model, folder = ir.load(self._path), self._path.parent
        emulate(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        content = ir.serde.serialize_model(model).SerializeToString()
        with loading(folder):
            self._session = onnxruntime.InferenceSession(content, options, providers=list(self._providers))
        return self
