"""Build ONNX graphs by hand, one operator at a time.

The graphs are authored, not traced: a 40-layer transformer takes a second and no weights in memory, every node carries
the path of its module ("blocks.3/self_attn/q/Gemm"), and every cast is deliberate. Weights are declared by official
name, shape and stored type, and bound to file offsets later.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from wan22.component import Tensor

TENSORRT = "trt"  # the domain of TensorRT's own operators
OPSET = 23  # the first with Attention, RMSNormalization and bfloat16 everywhere
IR_VERSION = 11
FLOAT, BFLOAT16, FLOAT16, INT64 = (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.INT64)

# Output types of operators that do not keep the type of their first input; None: set by the caller.
CHANGES_TYPE = {"Shape": INT64, "QuantizeLinear": None, "DequantizeLinear": None, "Cast": None}

Attribute = int | float | str | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class Placed:
    """The position of a stored weight: bytes ``[offset, offset + length)`` of a file in the graph's folder."""

    location: str
    offset: int
    length: int


class GraphBuilder:
    """An ONNX graph under construction. Operators return the ``ir.Value`` of their first output."""

    weights_are_inputs = False

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self._scope: list[str] = []
        self._count: dict[str, int] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}

    # -- edges

    def input(self, name: str, dtype: ir.DataType, dims: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dims: Sequence[int | str], dtype: ir.DataType = FLOAT) -> None:
        """Declare ``value`` as a graph output; graph inputs and outputs go through Identity."""
        if value.is_graph_input() or value.is_graph_output():
            value = self.op("Identity", value)
        value.name, value.shape, value.type = name, ir.Shape(dims), ir.TensorType(dtype)
        self.graph.outputs.append(value)

    # -- nodes

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes created inside with ``name``, following the official code's module paths."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        return self.multi(op_type, 1, *inputs, domain=domain, **attributes)[0]

    def multi(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute
    ) -> tuple[ir.Value, ...]:
        """Add an operator with several outputs, such as Split."""
        name = "/".join([*self._scope, op_type])
        self._count[name] = count = self._count.get(name, 0) + 1
        name = name if count == 1 else f"{name}_{count - 1}"
        self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, list(inputs), attributes, num_outputs=outputs, name=name, domain=domain)
        first = next((value.dtype for value in inputs if value is not None), None)
        dtype = CHANGES_TYPE.get(op_type, first)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
            value.type = ir.TensorType(dtype) if dtype is not None else None
        self.graph.append(node)
        return tuple(node.outputs)

    def constant(self, value: np.ndarray | float | Sequence[float], dtype: ir.DataType = INT64) -> ir.Value:
        """A small tensor inside the graph file; equal constants share one initializer."""
        array = np.asarray(value, dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(array, dtype=dtype, name=f"const_{len(self._constants)}")
            self._constants[key] = self._initializer(str(tensor.name), dtype, array.shape, tensor)
        return self._constants[key]

    def weight(self, key: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        """The checkpoint's tensor ``key``, stored as ``dtype``; :meth:`bind` assigns its bytes."""
        if key not in self.weights:
            self.weights[key] = self._initializer(key, dtype, shape, None)
        value = self.weights[key]
        if value.dtype != dtype or tuple(value.shape or ()) != tuple(shape):
            raise ValueError(f"{key} declared twice: {value.dtype}{value.shape} and {dtype}{list(shape)}")
        return value

    def joined(self, keys: Sequence[str], shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        """The tensors ``keys``, each of ``shape``, as one: concatenated along the first axis."""
        weights = [self.weight(key, shape, dtype) for key in keys]
        return weights[0] if len(weights) == 1 else self.concat(weights, 0)

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], tensor: ir.TensorProtocol | None
    ) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    # -- shorthands that keep formulas readable

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Add", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("Mul", a, b)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if x.dtype == dtype:
            return x
        value = self.op("Cast", x, to=int(dtype))
        value.type = ir.TensorType(dtype)
        return value

    def reshape(self, x: ir.Value, shape: Sequence[int] | ir.Value) -> ir.Value:
        return self.op("Reshape", x, shape if isinstance(shape, ir.Value) else self.constant(list(shape)))

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        return self.op("Transpose", x, perm=order)

    def split(self, x: ir.Value, parts: int, axis: int) -> tuple[ir.Value, ...]:
        return self.multi("Split", parts, x, axis=axis, num_outputs=parts)

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        return self.op("Concat", *values, axis=axis)

    def slice(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        return self.op("Slice", x, self.constant([start]), self.constant([stop]), self.constant([axis]))

    def silu(self, x: ir.Value) -> ir.Value:
        return self.mul(x, self.op("Sigmoid", x))

    # -- the finished graph

    def bind(self, placed: Mapping[str, Placed], folder: Path) -> None:
        """Point every declared weight to its bytes on disk without reading them."""
        for key, value in self.weights.items():
            place = placed[key]
            at, dtype, shape = (place.location, place.offset, place.length), value.dtype or FLOAT, value.shape
            value.const_value = ir.ExternalTensor(*at, dtype, shape=shape or ir.Shape([]), name=key, base_dir=folder)

    def save(self, path: Path) -> None:
        ir.save(ir.Model(self.graph, ir_version=IR_VERSION, producer_name="wan-trt"), path)

    def edges(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The inputs and outputs in the manifest's form."""
        return tuple(map(_edge, self.graph.inputs)), tuple(map(_edge, self.graph.outputs))


def _edge(value: ir.Value) -> Tensor:
    dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
    return Tensor(str(value.name), value.dtype.numpy().name if value.dtype else "", dims)
