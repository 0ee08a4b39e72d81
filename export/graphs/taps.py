"""Extra graph outputs that measure tensors: the largest magnitude of some, the mean row of others."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK
from wan22.bundle import Tensor

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
LARGEST, MEANS = "amax", "means"


class Tapped:
    """Call a tapped graph like the plain one and accumulate the measurements over all calls."""

    def __init__(self, graph: Callable[..., tuple[np.ndarray, ...]], taps: "Taps") -> None:
        self.graph, self.taps, self.calls = graph, taps, 0
        self._largest = np.zeros(len(taps.largest), np.float32)
        self._sums = np.zeros(sum(taps.means.values()))

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The graph's first output."""
        first, largest, *means = self.graph(**inputs)
        np.maximum(self._largest, largest, out=self._largest)  # propagates NaN
        for mean in means:
            self._sums += mean
        self.calls += 1
        return first

    @property
    def largest(self) -> dict[str, float]:
        """The largest magnitude by label, 0 before the first call."""
        return dict(zip(self.taps.largest, self._largest.tolist(), strict=True))

    @property
    def means(self) -> dict[str, np.ndarray]:
        """The mean row ``[columns]`` float32 by label; all calls have equal weight."""
        ends = np.cumsum(list(self.taps.means.values()))[:-1]
        parts = np.split((self._sums / max(self.calls, 1)).astype(np.float32), ends)
        return dict(zip(self.taps.means, parts, strict=True))


@dataclass(frozen=True)
class Taps:
    """The contents of a tapped graph's outputs: labels of maxima, labels of mean rows and their lengths."""

    largest: tuple[str, ...]
    means: Mapping[str, int] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        maxima = Tensor(LARGEST, "float32", (len(self.largest),))
        return (maxima, Tensor(MEANS, "float32", (sum(self.means.values()),))) if self.means else (maxima,)


def add_taps(
    model: ir.Model, largest: Mapping[str, ir.Value], means: Mapping[str, tuple[ir.Value, int]] | None = None
) -> Taps:
    """Append outputs to ``model``, in place.

    Args:
        model: a graph.
        largest: label → value whose largest magnitude is output.
        means: label → rows ``[L, length]`` whose mean is output, and ``length``.
    """
    graph = model.graph
    first = ir.Value(name=f"{LARGEST}/first", shape=ir.Shape([1]), type=ir.TensorType(INT64))
    first.const_value = ir.tensor([0], dtype=INT64, name=first.name)
    graph.initializers[f"{LARGEST}/first"] = first
    maxima = []
    for label, value in largest.items():
        name, dtype = f"{LARGEST}/{label}", value.dtype or FLOAT
        magnitude = _append(graph, "Abs", [value], name, dtype)
        top = _wide(graph, _append(graph, "ReduceMax", [magnitude], name, dtype, keepdims=0), name)
        maxima.append(_append(graph, "Unsqueeze", [top, first], name, FLOAT))
    _output(graph, LARGEST, maxima, len(maxima))
    rows = []
    for label, (value, _) in (means or {}).items():
        wide = _wide(graph, value, f"{MEANS}/{label}")
        rows.append(_append(graph, "ReduceMean", [wide, first], f"{MEANS}/{label}", FLOAT, keepdims=0))
    taps = Taps(tuple(largest), {label: length for label, (_, length) in (means or {}).items()})
    if rows:
        _output(graph, MEANS, rows, sum(taps.means.values()))
    return taps


def _output(graph: ir.Graph, name: str, parts: list[ir.Value], length: int) -> None:
    joined = _append(graph, "Concat", parts, f"{name}/all", FLOAT, axis=0)
    joined.name, joined.shape = name, ir.Shape([length])
    graph.outputs.append(joined)


def _wide(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    return value if value.dtype == FLOAT else _append(graph, "Cast", [value], name, FLOAT, to=int(FLOAT))


def _append(
    graph: ir.Graph, op: str, inputs: Iterable[ir.Value], name: str, dtype: ir.DataType, **attributes: int
) -> ir.Value:
    node = ir.node(op, list(inputs), attributes, name=f"{name}/{op}")
    value = node.outputs[0]
    value.name, value.type = f"{name}/{op}:0", ir.TensorType(dtype)
    graph.append(node)
    return value


def linear_inputs(model: ir.Model) -> dict[str, ir.Value]:
    """The input of each linear in the blocks of a 16- or 32-bit transformer, by official name ("blocks.0.ffn.2").

    Linears are identified by their weights, because one product may compute several of them.
    """
    entering: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type in ("Gemm", "MatMul") and node.inputs[0] is not None and node.inputs[1] is not None:
            for name in _weights(node.inputs[1]):
                entering[name.removesuffix(".weight")] = node.inputs[0]
    names = [name for name in entering if name.startswith("blocks.")]
    return {name: entering[name] for name in names if name.split(".", 2)[-1] in DIT_LINEARS_PER_BLOCK}


def _weights(value: ir.Value) -> list[str]:
    """The stored weights behind ``value``, through Concat, Transpose and Cast."""
    node = value.producer()
    if node is None:
        return [str(value.name)] if value.is_initializer() else []
    if node.op_type not in ("Concat", "Transpose", "Cast"):
        return []
    return [name for part in node.inputs if part is not None for name in _weights(part)]
