"""Graphs with synthetic weights, run by ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.graphs.builder import Placed


def made_up(shapes, seed=0):
    """Weights that exercise every part of a model: fan-in scaled matrices, norms near one, random values elsewhere."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1 and "modulation" not in name and "gamma" not in name:
            weights[name] = values / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        elif name.endswith(("weight", "gamma")):
            weights[name] = 1 + 0.2 * values
        else:
            weights[name] = 0.3 * values
    return weights


@pytest.fixture
def run_graph(tmp_path):
    """``run_graph(builder, weights)`` → the graph as a function of keyword arrays.

    Without ``prepack``, matrices are multiplied as if they were inputs: packed ones are summed in another order.
    """

    def load(g, weights, *, prepack=True):
        placed, data = {}, bytearray()
        for name, value in g.weights.items():
            stored = weights[name].astype(ir.DataType(value.dtype).numpy())
            placed[name] = Placed("weights.bin", len(data), stored.nbytes)
            data += stored.tobytes()
        (tmp_path / "weights.bin").write_bytes(data)
        g.bind(placed, tmp_path)
        g.save(tmp_path / "graph.onnx")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
        session = ort.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        return lambda **inputs: session.run(None, inputs)

    return load
