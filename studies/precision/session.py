"""ONNX graphs in memory as functions of numpy arrays, computed by ONNX Runtime on the CPU."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from export.graphs.builder import IR_VERSION, GraphBuilder
from export.graphs.linear import FLOAT4
from export.graphs.weights_file import convert

Read = Callable[[str], np.ndarray]
Graph = Callable[..., tuple[np.ndarray, ...]]


def fill(g: GraphBuilder, read: Read) -> ir.Model:
    """The graph of ``g`` with embedded weights, each read by name and converted to its declared dtype."""
    for key, value in g.weights.items():
        dtype = value.dtype or ir.DataType.FLOAT
        if dtype == FLOAT4:  # two codes a byte
            packed, shape = np.asarray(read(key)).reshape(-1), value.shape or ir.Shape([])
            value.const_value = ir.PackedTensor(packed, dtype, shape=shape, name=key)
            continue
        array = convert(key, np.asarray(read(key)), dtype.numpy())
        value.const_value = ir.Tensor(array, dtype=dtype, name=key)
    return ir.Model(g.graph, ir_version=IR_VERSION)


def open_graph(model: ir.Model) -> Graph:
    """A function that runs ``model``: ``outputs = graph(latents=..., ...)``, always a tuple."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(**inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(session.run(None, inputs))

    return run
