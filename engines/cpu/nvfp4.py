"""NVFP4 in operators that ONNX Runtime computes on a CPU: it has no 4-bit floats, and TensorRT's quantiser is its own.

Codes become 4-bit integers, which have the same bytes, and a table of their values. Rows are rounded by comparing
magnitudes with the middles between two codes; a middle goes to the even code, as the hardware rounds.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

FLOAT4, UINT4 = ir.DataType.FLOAT4E2M1, ir.DataType.UINT4
FLOAT, FLOAT8, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT32, ir.DataType.BOOL
QUANTISER, GROUP = "TRT_FP4DynamicQuantize", 16
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by code
MIDDLES = (  # and the step behind each
    (0.25, 0.5, "Greater"),
    (0.75, 0.5, "GreaterOrEqual"),
    (1.25, 0.5, "Greater"),
    (1.75, 0.5, "GreaterOrEqual"),
    (2.5, 1.0, "Greater"),
    (3.5, 1.0, "GreaterOrEqual"),
    (5.0, 2.0, "Greater"),
)


def values_of(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The values of ``packed`` codes, two a byte, the first in the low half."""
    return VALUES[np.stack((packed & 15, packed >> 4), -1)].reshape(-1)


def emulate_nvfp4(model: ir.Model) -> None:
    """Rewrite ``model`` in place, if it has NVFP4. Steps of groups and values come out as TensorRT's, in float32."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == QUANTISER]:
        _quantiser(graph, node)
    for name, weight in list(graph.initializers.items()):
        if weight.dtype == FLOAT4:
            _matrix(graph, name, weight)
    graph.opset_imports.pop("trt", None)


class _Writer:
    """Insert operators in front of ``node``; values are named after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def op(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType = FLOAT, **attributes: int) -> ir.Value:
        self._count += 1
        node = ir.node(op_type, list(inputs), attributes, name=f"{self._node.name}/{op_type}_{self._count}")
        value = node.outputs[0]
        value.name, value.type = f"{node.name}:0", ir.TensorType(dtype)
        self._graph.insert_before(self._node, node)
        return value

    def constant(self, array: object, dtype: type) -> ir.Value:
        self._count += 1
        name = f"{self._node.name}/constant_{self._count}"
        values: npt.NDArray[np.generic] = np.asarray(array, dtype)
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.initializers[name] = value
        return value

    def grouped(self, x: ir.Value, size: int) -> ir.Value:
        """``[rows, in]`` as ``[rows, in / size, size]``."""
        return self.op("Reshape", x, self.constant([0, -1, size], np.int64), dtype=x.dtype or FLOAT)

    def flat(self, x: ir.Value) -> ir.Value:
        return self.op("Reshape", x, self.constant([0, -1], np.int64), dtype=x.dtype or FLOAT)


def _quantiser(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the quantiser and the dequantisation of its codes; that of the groups' scales stays."""
    x, step = node.inputs
    codes, steps = node.outputs
    assert x is not None and step is not None
    w = _Writer(graph, node)
    groups = w.grouped(w.op("Cast", x, to=int(FLOAT)), GROUP)
    largest = w.op("ReduceMax", w.op("Abs", groups), w.constant([2], np.int64), keepdims=1)
    scale = w.op("Div", w.op("Div", largest, w.constant(6.0, np.float32)), step)
    steps.replace_all_uses_with(w.flat(w.op("Cast", scale, dtype=FLOAT8, to=int(FLOAT8))))
    (reader,) = (use.node for use in codes.uses())
    w = _Writer(graph, reader)
    wide = reader.inputs[1]
    assert wide is not None
    by = w.grouped(wide, 1)
    positive = w.op("Greater", by, w.constant(0.0, np.float32), dtype=BOOL)
    scaled = w.op("Div", groups, w.op("Where", positive, by, w.constant(1.0, np.float32)))
    magnitude, rounded = w.op("Abs", scaled), w.constant(0.0, np.float32)
    for middle, more, compare in MIDDLES:
        beyond = w.op(compare, magnitude, w.constant(middle, np.float32), dtype=BOOL)
        rounded = w.op("Add", rounded, w.op("Mul", w.op("Cast", beyond, to=int(FLOAT)), w.constant(more, np.float32)))
    made = w.flat(w.op("Mul", w.op("Mul", w.op("Sign", scaled), rounded), by))
    reader.outputs[0].replace_all_uses_with(made)
    graph.remove(reader, safe=True)
    graph.remove(node, safe=True)


def _matrix(graph: ir.Graph, name: str, weight: ir.Value) -> None:
    """Replace the dequantisation of a stored matrix of codes."""
    stored = weight.const_value
    if isinstance(stored, ir.ExternalTensor):
        place = str(stored.location), stored.offset, stored.length
        weight.const_value = ir.ExternalTensor(*place, UINT4, shape=stored.shape, name=name, base_dir=stored.base_dir)
    elif stored is not None:
        packed, shape = np.frombuffer(stored.tobytes(), np.uint8), weight.shape
        assert shape is not None
        weight.const_value = ir.PackedTensor(packed, UINT4, shape=shape, name=name)
    weight.type = ir.TensorType(UINT4)
    (reader,) = (use.node for use in weight.uses())
    w, scale = _Writer(graph, reader), reader.inputs[1]
    assert scale is not None
    values = w.op("Gather", w.constant(VALUES, np.float32), w.op("Cast", weight, dtype=INT32, to=int(INT32)))
    made = w.flat(w.op("Mul", w.grouped(values, GROUP), w.grouped(scale, 1)))
    reader.outputs[0].replace_all_uses_with(made)
    graph.remove(reader, safe=True)
