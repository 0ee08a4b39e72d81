"""The arithmetic of an ONNX graph, counted node by node for given input shapes, without reading weights.

Matrix products, convolutions and attention count two operations per multiply-add. All other nodes are under a percent.
The shapes inside the graph come from ONNX's shape inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from validate.bench.straight_graph import FUSED, make_known, straighten

Shape = tuple[int, ...]
COUNTED = {"MatMul", "Gemm", "Conv", "Attention", "MultiHeadAttention", "FusedMatMul"}


@dataclass(frozen=True)
class GraphFlops:
    """``with_weights``: linears and convolutions. ``attention``: products of activations with each other."""

    with_weights: float
    attention: float

    @property
    def total(self) -> float:
        return self.with_weights + self.attention

    def plus(self, other: "GraphFlops", times: int) -> "GraphFlops":
        return GraphFlops(self.with_weights + times * other.with_weights, self.attention + times * other.attention)


def graph_flops(path: Path, inputs: Mapping[str, Shape], rows_by_value: int | None = None) -> GraphFlops | None:
    """The arithmetic of one call of the graph; None if a node cannot be counted.

    Args:
        path: an ONNX file.
        inputs: shapes by name of the input.
        rows_by_value: the size of dimensions that depend on values instead of shapes: a CPU engine keeps the prompt's
            rows of the text and one row for all padding.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not straighten(model, rows_by_value):
        return None
    if any(node.domain and node.op_type not in FUSED for node in model.graph.node):
        return None
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes, with_weights, attention = _shapes(model, inputs, rows_by_value), 0.0, 0.0
    for node in model.graph.node:
        operands = [name for name in node.input if name]
        if node.op_type == "Constant" or (operands and constants.issuperset(operands)):
            constants.update(node.output)  # a dequantised or transposed weight is a constant too
            continue
        flops = _flops(node, shapes)
        if flops is None:
            return None
        if constants.isdisjoint(operands[:2]):
            attention += flops
        else:
            with_weights += flops
    return GraphFlops(with_weights, attention)


def stored_bytes(path: Path) -> int:
    """The size of all weights that the graph at ``path`` reads."""
    import onnx

    stored = onnx.load(path, load_external_data=False).graph.initializer
    sizes = (onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in stored)
    return sum(math.prod(tensor.dims) * size for tensor, size in zip(stored, sizes, strict=True))


def _shapes(model: Any, inputs: Mapping[str, Shape], rows_by_value: int | None) -> dict[str, Shape]:
    """The shapes that follow from ``inputs`` and, if known, ``rows_by_value``, by value."""
    from onnx import shape_inference

    standing_in = type(model)()
    standing_in.CopyFrom(model)
    for value in standing_in.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True):
            dim.dim_value = size
    for value in standing_in.graph.output:
        value.type.tensor_type.ClearField("shape")
    make_known(standing_in, rows_by_value)
    inferred = shape_inference.infer_shapes(standing_in, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        sizes = tuple(dim.dim_value if dim.HasField("dim_value") else rows_by_value or 0 for dim in dims)
        if all(sizes):
            shapes[value.name] = sizes
    return shapes


def _flops(node: Any, shapes: Mapping[str, Shape]) -> float | None:
    """The operations of one node: 0 for nodes that do not count, None if a shape is unknown."""
    if node.op_type not in COUNTED:
        return 0.0
    if not all(name in shapes for name in (node.output[0], *node.input[:2])):
        return None
    out, a, b = (shapes[name] for name in (node.output[0], *node.input[:2]))
    if node.op_type == "Conv":
        return 2.0 * math.prod(out) * math.prod(b[1:])
    if "Attention" in node.op_type:  # queries, keys and values [B, L, D] or [B, heads, L, D]
        values = shapes.get(node.input[2], ())
        alike = len(a) == len(b) == len(values)
        return 2.0 * math.prod(a[:-1]) * b[-2] * (a[-1] + values[-1]) if alike else None
    is_transposed = any(item.name == "transA" and item.i for item in node.attribute)
    return 2.0 * math.prod(out) * a[-2 if is_transposed else -1]
