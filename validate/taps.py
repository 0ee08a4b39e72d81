"""A graph that also tells how large its tensors are: one more output with the largest magnitude of each of them."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from export.schema import DIT_LINEARS_PER_BLOCK
from wan22.bundle import Tensor

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
OUTPUT = "amax"


class Tapped:
    """A tapped graph in the place of the plain one; remembers the maxima over all its calls."""

    def __init__(self, graph: Callable[..., tuple[np.ndarray, ...]], labels: Iterable[str]) -> None:
        self.graph, self.labels, self.calls = graph, tuple(labels), 0
        self._largest = np.zeros(len(self.labels), np.float32)

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The graph's first output."""
        first, *_, amax = self.graph(**inputs)
        np.maximum(self._largest, amax, out=self._largest)  # NaN stays
        self.calls += 1
        return first

    @property
    def largest(self) -> dict[str, float]:
        """Largest magnitude by label, 0 before the first call."""
        return dict(zip(self.labels, self._largest.tolist(), strict=True))


def add_taps(model: ir.Model, tapped: Mapping[str, ir.Value]) -> Tensor:
    """Appends the output ``amax``, float32 ``[len(tapped)]`` in the order of ``tapped``; returns its description."""
    graph = model.graph
    front = ir.Value(name=f"{OUTPUT}/front", shape=ir.Shape([1]), type=ir.TensorType(INT64))
    front.const_value = ir.tensor([0], dtype=INT64, name=front.name)
    graph.initializers[f"{OUTPUT}/front"] = front
    largest = []
    for label, value in tapped.items():
        dtype = value.dtype or FLOAT
        magnitude = _appended(graph, "Abs", [value], label, dtype)
        top = _appended(graph, "ReduceMax", [magnitude], label, dtype, keepdims=0)
        wide = top if dtype == FLOAT else _appended(graph, "Cast", [top], label, FLOAT, to=int(FLOAT))
        largest.append(_appended(graph, "Unsqueeze", [wide, front], label, FLOAT))
    joined = _appended(graph, "Concat", largest, "all", FLOAT, axis=0)
    joined.name, joined.shape = OUTPUT, ir.Shape([len(largest)])
    graph.outputs.append(joined)
    return Tensor(OUTPUT, "float32", (len(largest),))


def _appended(
    graph: ir.Graph, op: str, inputs: Iterable[ir.Value], label: str, dtype: ir.DataType, **attributes: int
) -> ir.Value:
    node = ir.node(op, list(inputs), attributes, name=f"{OUTPUT}/{label}/{op}")
    value = node.outputs[0]
    value.name, value.type = f"{OUTPUT}/{label}/{op}:0", ir.TensorType(dtype)
    graph.append(node)
    return value


def linear_inputs(model: ir.Model) -> dict[str, ir.Value]:
    """What enters each linear of the blocks of a 16- or 32-bit transformer, by official name ("blocks.0.ffn.2").

    Linears are known by the weights that they multiply: the graph may have joined several into one product.
    """
    entering: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type in ("Gemm", "MatMul") and node.inputs[0] is not None and node.inputs[1] is not None:
            for name in _weights(node.inputs[1]):
                entering[name.removesuffix(".weight")] = node.inputs[0]
    return {name: value for name, value in entering.items() if _in_a_block(name)}


def _weights(value: ir.Value) -> list[str]:
    """The stored weights that ``value`` is made of, across joining, turning and casting."""
    node = value.producer()
    if node is None:
        return [str(value.name)] if value.is_initializer() else []
    if node.op_type not in ("Concat", "Transpose", "Cast"):
        return []
    return [name for part in node.inputs if part is not None for name in _weights(part)]


def _in_a_block(name: str) -> bool:
    parts = name.split(".", 2)
    return len(parts) == 3 and parts[0] == "blocks" and parts[2] in DIT_LINEARS_PER_BLOCK
