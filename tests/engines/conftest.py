"""Transformer graphs with synthetic weights, compiled for absent GPUs."""

from dataclasses import replace

import numpy as np
import pytest

from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from engines.inspect.log import read_log
from engines.inspect.report import FusionReport
from engines.profiles import profiles_for
from engines.targets import TARGETS
from export.graphs.builder import BFLOAT16, Placed
from export.graphs.dit import dit_graph
from export.precisions import usual_quantised
from wan22.precision import Precision
from wan22.specs import SPECS

QUANTISED = {precision: usual_quantised(precision) for precision in Precision}
REPEATED_VALUES = 2**20 + 7  # an odd length, so that no two rows are equal


def bound(g, folder):
    """Bind every weight of ``g`` to one file per type; the values are arbitrary but not all equal."""
    rng, placed = np.random.default_rng(0), {}
    for dtype in {value.dtype for value in g.weights.values()}:
        weights = {key: value for key, value in g.weights.items() if value.dtype == dtype}
        values = np.abs(rng.standard_normal(REPEATED_VALUES, dtype=np.float32)) * 0.02 + 0.001
        block = values.astype(dtype.numpy())
        longest = max(int(np.prod(tuple(value.shape))) for value in weights.values()) + 128 * len(weights)
        with (folder / f"{dtype.name}.bin").open("wb") as file:
            for _ in range(-(-longest // len(block))):
                block.tofile(file)
        for index, (key, value) in enumerate(weights.items()):
            size = int(np.prod(tuple(value.shape))) * block.itemsize
            placed[key] = Placed(f"{dtype.name}.bin", 128 * index, size)
    g.bind(placed, folder)


@pytest.fixture
def compiled(tmp_path):
    """``compiled(model, target, precision, ...)`` → the fusion report of the transformer."""
    pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx")

    def build(model, target, precision, size="256x160", frames="5..17", layers=None):
        spec = SPECS[model]
        dit = spec.dit if layers is None else replace(spec.dit, layers=layers)
        g = dit_graph(dit, BFLOAT16, None, QUANTISED[precision])
        bound(g, tmp_path)
        g.save(tmp_path / "dit.onnx")
        options = EngineOptions(TARGETS[target], profiles_for(spec, size, frames), g.edges()[0])
        built = build_engine(tmp_path / "dit.onnx", tmp_path / "dit.engine", options)
        for large in (built.path, *tmp_path.glob("*.bin")):
            large.unlink()
        return FusionReport("dit", TARGETS[target], read_log(built.log), precision)

    return build
