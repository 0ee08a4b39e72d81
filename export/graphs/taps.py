"""Extra graph outputs that measure tensors: the largest magnitude of some, the channels and the crest of others.

Parts of the forwards themselves are kept too, from which an export computes rows that matrices are rounded for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from export.checkpoint.schema import DIT_LINEARS_PER_BLOCK
from wan22.component import Tensor
from wan22.specs import PATCH

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
LARGEST, MEANS, TOPS, BOTTOMS, SQUARES = "amax", "means", "tops", "bottoms", "squares"
PARTS, KEPT = 4, 16  # of a forward that are drawn, and of all forwards that are kept
GRID = (2, 8, 8)  # frames, rows and columns of tokens of a part, at most
SEED = 0
Vectors = tuple[np.ndarray, np.ndarray]  # float32 [length] each: a mean to subtract, factors to multiply by


@dataclass(frozen=True, eq=False)
class Forwards:
    """Small parts of forwards, all float32 and of the same size, or forwards over noise."""

    video: np.ndarray  # [runs, C, f, h, w]: latents, and behind their channels the condition if the model takes one
    time_features: np.ndarray  # [runs, 256]
    text: np.ndarray  # [runs or 1, at most 512, text width]; zeros follow

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        frames, height, width = self.video.shape[2:]
        return frames, height // PATCH[1], width // PATCH[2]


class Tapped:
    """Call a tapped graph like the plain one and accumulate the measurements over all calls."""

    def __init__(self, graph: Callable[..., tuple[np.ndarray, ...]], taps: "Taps") -> None:
        self.graph, self.taps, self.calls = graph, taps, 0
        self._largest = np.zeros(len(taps.largest), np.float32)
        columns = sum(taps.rows.values())
        self._sums, self._squares = np.zeros(columns), np.zeros(2 * len(taps.prepared))
        self._tops, self._bottoms = np.full(columns, -np.inf, np.float32), np.full(columns, np.inf, np.float32)
        self._random, self._kept, self._offered = np.random.default_rng(SEED), list[tuple[np.ndarray, ...]](), 0

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The graph's first output."""
        first, largest, *rest = self.graph(**inputs)
        np.maximum(self._largest, largest, out=self._largest)  # propagates NaN
        if self.taps.rows:
            means, tops, bottoms, *rest = rest
            self._sums += means
            np.maximum(self._tops, tops, out=self._tops)
            np.minimum(self._bottoms, bottoms, out=self._bottoms)
        if self.taps.prepared:
            self._squares += rest[0]
        self.calls += 1
        for _ in range(PARTS):
            self._keep(**inputs)
        return first

    def _keep(self, latents: np.ndarray, time_features: np.ndarray, text: np.ndarray, **others: np.ndarray) -> None:
        """Keep a part of this call; of more than there is room for, each is kept with the same probability."""
        self._offered += 1
        place = len(self._kept) if self._offered <= KEPT else int(self._random.integers(self._offered))
        if place >= KEPT:
            return
        video = np.concatenate([_on_host(x)[0] for x in (latents, others.get("condition")) if x is not None])
        part = []
        for length, tokens, step in zip(video.shape[1:], GRID, PATCH, strict=True):
            first = step * int(self._random.integers(max(length // step - tokens, 0) + 1))
            part.append(slice(first, first + step * tokens))
        padded = _on_host(text)[0]
        words = padded[: int(np.flatnonzero(padded.any(1)).max(initial=0)) + 1]
        self._kept[place : place + 1] = [(video[:, *part].copy(), _on_host(time_features)[-1], words.copy())]

    @property
    def forwards(self) -> Forwards:
        """The parts of forwards that were kept."""
        videos, features, texts = zip(*self._kept, strict=True)
        longest = max(map(len, texts))
        padded = [np.pad(text, ((0, longest - len(text)), (0, 0))) for text in texts]
        return Forwards(*(np.stack(each).astype(np.float32) for each in (videos, features, padded)))

    @property
    def largest(self) -> dict[str, float]:
        """The largest magnitude by label, 0 before the first call."""
        return dict(zip(self.taps.largest, self._largest.tolist(), strict=True))

    @property
    def means(self) -> dict[str, np.ndarray]:
        """The mean row ``[columns]`` float32 by label; all calls have equal weight."""
        return self._by_label((self._sums / max(self.calls, 1)).astype(np.float32))

    @property
    def spreads(self) -> dict[str, np.ndarray]:
        """The largest distance of each column from its mean, ``[columns]`` float32 by label."""
        tops, bottoms = self._by_label(self._tops), self._by_label(self._bottoms)
        return {label: np.maximum(tops[label] - mean, mean - bottoms[label]) for label, mean in self.means.items()}

    @property
    def crests(self) -> dict[str, float]:
        """The crest by label: what INT8 with a scale per row costs is this over 440. NaN for rows of zeros."""
        largest, mean = self._squares.reshape(-1, 2).T
        with np.errstate(invalid="ignore"):
            return dict(zip(self.taps.prepared, np.sqrt(largest / mean).tolist(), strict=True))

    def _by_label(self, joined: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum(list(self.taps.rows.values()))[:-1]
        return dict(zip(self.taps.rows, np.split(joined, ends), strict=True))


def _on_host(x: Any) -> np.ndarray:
    host: np.ndarray = x.get() if hasattr(x, "get") else x
    return host


@dataclass(frozen=True)
class Taps:
    """The labels of a tapped graph's outputs: of maxima, of rows with their lengths, of crests."""

    largest: tuple[str, ...]
    rows: Mapping[str, int] = field(default_factory=dict)
    prepared: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        columns = sum(self.rows.values())
        of_rows = [Tensor(name, "float32", (columns,)) for name in (MEANS, TOPS, BOTTOMS) if self.rows]
        squares = [Tensor(SQUARES, "float32", (2 * len(self.prepared),))] if self.prepared else []
        return (Tensor(LARGEST, "float32", (len(self.largest),)), *of_rows, *squares)


def add_taps(
    model: ir.Model,
    largest: Mapping[str, ir.Value],
    rows: Mapping[str, tuple[ir.Value, int]] | None = None,
    prepared: Mapping[str, Vectors] | None = None,
) -> Taps:
    """Append outputs to ``model``, in place.

    Args:
        model: a graph.
        largest: label → value whose largest magnitude is output.
        rows: label → rows ``[L, length]`` whose mean, largest and smallest row are output, and ``length``.
        prepared: label of some of these → vectors with which the crest of the rows is measured.
    """
    graph, rows, prepared = model.graph, rows or {}, prepared or {}
    first = _constant(graph, f"{LARGEST}/first", np.array([0], np.int64))
    last = _constant(graph, f"{LARGEST}/last", np.array([1], np.int64))
    maxima = []
    for label, value in largest.items():
        name, dtype = f"{LARGEST}/{label}", value.dtype or FLOAT
        magnitude = _append(graph, "Abs", [value], name, dtype)
        top = _wide(graph, _append(graph, "ReduceMax", [magnitude], name, dtype, keepdims=0), name)
        maxima.append(_append(graph, "Unsqueeze", [top, first], name, FLOAT))
    _output(graph, LARGEST, maxima, len(maxima))
    columns = sum(length for _, length in rows.values())
    wide = {label: _wide(graph, value, f"{MEANS}/{label}") for label, (value, _) in rows.items()}
    for name, op in ((MEANS, "ReduceMean"), (TOPS, "ReduceMax"), (BOTTOMS, "ReduceMin")) if rows else ():
        parts = [_append(graph, op, [x, first], f"{name}/{label}", FLOAT, keepdims=0) for label, x in wide.items()]
        _output(graph, name, parts, columns)
    squares = []
    for label, vectors in prepared.items():
        name = f"{SQUARES}/{label}"
        mean, factor = (_constant(graph, f"{name}/{i}", vector.astype(np.float32)) for i, vector in enumerate(vectors))
        x = _append(graph, "Mul", [_append(graph, "Sub", [wide[label], mean], name, FLOAT), factor], name, FLOAT)
        square = _append(graph, "Mul", [x, x], f"{name}/square", FLOAT)
        for op in ("ReduceMax", "ReduceMean"):
            of_row = _append(graph, op, [square, last], name, FLOAT, keepdims=0)
            squares.append(_append(graph, "ReduceMean", [of_row, first], f"{name}/{op}", FLOAT, keepdims=1))
    if squares:
        _output(graph, SQUARES, squares, len(squares))
    return Taps(tuple(largest), {label: length for label, (_, length) in rows.items()}, tuple(prepared))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    dtype = INT64 if array.dtype == np.int64 else FLOAT
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype))
    value.const_value = ir.tensor(array, dtype=dtype, name=name)
    graph.initializers[name] = value
    return value


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
