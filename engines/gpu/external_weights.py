"""Weights as inputs of an engine instead of constants: one small engine for both experts and every LoRA.

The compiler never sees a weight: it needs a few GB for a 14B model, and the engine contains only kernels. Matrices stay
as stored, [out, in]: its kernels read them in place, and the FP8 kernels of Ada and Ampere exist only for this layout.
It cannot join the parts of ``qkv``, so this module does. An FP8 matrix is dequantised with the constant scale 1 (with a
scale as input, no FP8 kernel is used), and its real scale, an input, multiplies the float32 result. For the same reason
the scales of Q and K in FP8 attention are constants: for each, the largest among all weights that use the engine. A
scale only has to be large enough, since the relative precision of FP8 does not depend on magnitude.

All weights of a component are in one file at fixed offsets; components that share an engine have files of the same
layout. The layout is stored next to the engine as JSON.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from wan22.bundle import File
from wan22.errors import UserError
from wan22.external_layout import Place, read_layout
from wan22.progress import Progress, silent

ALIGNMENT_BYTES = 256  # same as CUDA's allocations
FLOAT, FLOAT8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
BEFORE_CAST = ("Slice", "Reshape", "Split")  # operators between a product and its conversion to float32


@dataclass(frozen=True)
class StoredTensor:
    """The location of a stored tensor."""

    location: str  # relative to the ONNX bundle
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """An input of the engine: one stored tensor, or several concatenated along the first stored axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ir.DataType[self.dtype].numpy().itemsize

    @property
    def layout(self) -> tuple[str, str, tuple[int, ...]]:
        """The properties in which weights that share an engine must agree."""
        return self.name, self.dtype, self.shape


def externalise(path: Path, attention_scales: Mapping[str, float] | None = None) -> tuple[ir.Model, tuple[Weight, ...]]:
    """The graph at ``path`` with every stored weight as an input, and these inputs sorted by name.

    Args:
        path: the ONNX file, with its weights in the same folder.
        attention_scales: scales of Q and K in FP8 attention by name; empty or None uses the graph's.

    Raises:
        UserError: the graph has static FP8 scales, which compilers need as constants.
    """
    model = ir.load(path)
    graph = model.graph
    for name, scale in (attention_scales or attention_scales_of([path])).items():
        graph.initializers[name].const_value = ir.tensor(np.array(scale, np.float32), name=name)
    joins = dict(_joins(graph))
    single = [value for value in _external_values(graph) if not any(value in parts for parts in joins.values())]
    weights = [_single_input(graph, value) for value in single]
    weights += [_joint_input(graph, concat, parts) for concat, parts in joins.items()]
    return model, tuple(sorted(weights, key=lambda weight: weight.name))


def attention_scales_of(paths: Iterable[Path]) -> dict[str, float]:
    """Scales of Q and K valid for all graphs at ``paths``, by name; empty without FP8 attention."""
    scales: dict[str, float] = {}
    for path in paths:
        for value in _external_values(ir.load(path).graph):
            if (name := str(value.name)).endswith((".q_scale", ".k_scale")) and value.const_value is not None:
                scales[name] = max(scales.get(name, 0.0), float(value.const_value.numpy()))
    return scales


def _external_values(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]


def _joins(graph: ir.Graph) -> Iterator[tuple[ir.Node, tuple[ir.Value, ...]]]:
    """Concatenations of complete stored tensors along their first axis."""
    stored = set(_external_values(graph))
    for node in graph:
        inputs = tuple(value for value in node.inputs if value is not None)
        if node.op_type == "Concat" and node.attributes["axis"].as_int() == 0 and stored.issuperset(inputs):
            yield node, inputs


def _source(value: ir.Value) -> StoredTensor:
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return StoredTensor(str(tensor.location), tensor.offset or 0, tuple(tensor.shape.numpy()))


def _single_input(graph: ir.Graph, value: ir.Value) -> Weight:
    """Turn an initializer into an input."""
    source, name = _source(value), str(value.name)
    if name.endswith(".input_scale"):
        raise UserError(f"static FP8 scale {name}", "scales computed per token", "export without --input-scales")
    del graph.initializers[name]
    if value.dtype == FLOAT8:
        _scale_products(graph, value)
    return _as_input(graph, value, source.shape, (source,))


def _joint_input(graph: ir.Graph, concat: ir.Node, parts: Sequence[ir.Value]) -> Weight:
    """Turn the concatenation of ``parts`` into one input."""
    value, sources = concat.outputs[0], tuple(map(_source, parts))
    for part in parts:
        del graph.initializers[str(part.name)]
    module, _, leaf = str(parts[0].name).rsplit(".", 2)
    letters = "".join(str(part.name).rsplit(".", 2)[1] for part in parts)
    whole = ir.Value(name=f"{module}.{letters}.{leaf}", type=parts[0].type)
    for user, index in tuple(value.uses()):
        user.replace_input_with(index, whole)
    graph.remove(concat, safe=True)
    rows = sum(source.shape[0] for source in sources)
    return _as_input(graph, whole, (rows, *sources[0].shape[1:]), sources)


def _as_input(graph: ir.Graph, value: ir.Value, shape: tuple[int, ...], sources: tuple[StoredTensor, ...]) -> Weight:
    assert value.dtype is not None
    value.const_value, value.shape = None, ir.Shape(shape)
    graph.inputs.append(value)
    return Weight(str(value.name), value.dtype.name, shape, sources)


def _scale_products(graph: ir.Graph, value: ir.Value) -> None:
    """Dequantise with the constant 1 and multiply the float32 products by the real scale."""
    (dequantise, _), *others = value.uses()
    (transpose, _), *more = dequantise.outputs[0].uses()
    assert not others and not more and transpose.op_type == "Transpose"
    scale = dequantise.inputs[1]
    assert scale is not None
    dequantise.replace_input_with(1, _unit(graph))
    in_float = dequantise.attributes["output_dtype"].as_int() == FLOAT
    for product, _ in tuple(transpose.outputs[0].uses()):
        for node in (product,) if in_float else tuple(_casts(product.outputs[0])):
            _scale(graph, node, scale)


def _unit(graph: ir.Graph) -> ir.Value:
    if "unit_scale" not in graph.initializers:
        tensor = ir.tensor(np.array(1.0, np.float32), name="unit_scale")
        graph.initializers["unit_scale"] = ir.Value(
            name="unit_scale", shape=ir.Shape(()), type=ir.TensorType(FLOAT), const_value=tensor
        )
    return graph.initializers["unit_scale"]


def _casts(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that convert a product, or some of its columns, to float32."""
    for user, _ in value.uses():
        if user.op_type in BEFORE_CAST:
            for output in user.outputs:
                yield from _casts(output)
        elif user.op_type == "Cast" and user.attributes["to"].as_int() == FLOAT:
            yield user
        else:
            raise ValueError(f"{user.name} reads an FP8 product before its conversion to float32")


def _scale(graph: ir.Graph, node: ir.Node, scale: ir.Value) -> None:
    """Multiply the output of ``node`` by ``scale``."""
    users, name = tuple(node.outputs[0].uses()), f"{node.name}/weight_scale"
    scaled = ir.node("Mul", [node.outputs[0], scale], name=name)
    scaled.outputs[0].name, scaled.outputs[0].type = f"{name}:0", ir.TensorType(FLOAT)
    graph.insert_after(node, scaled)
    for user, index in users:
        user.replace_input_with(index, scaled.outputs[0])


# -- files


def layout(weights: Sequence[Weight]) -> tuple[tuple[Place, ...], int]:
    """The place of every weight in a component's file, and the file's size in bytes."""
    places, end = [], 0
    for weight in weights:
        places.append(Place(weight.name, end, weight.size_bytes, weight.shape))
        end += -(-weight.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(places), end


def check_layout(path: Path, weights: Sequence[Weight]) -> None:
    """Refuse weights that do not fit the engine whose layout is stored at ``path``.

    Raises:
        UserError: the layouts differ.
    """
    if read_layout(path) != list(layout(weights)[0]):
        found = f"{len(weights)} weights with a layout other than {path}"
        raise UserError(found, "an export with the engine's options", "export and build again")


def write_weights(folder: Path, weights: Sequence[Weight], target: Path, progress: Progress = silent) -> File:
    """Write a component's weights file from the ONNX bundle ``folder``, with one weight in memory at a time."""
    digest, (places, total) = hashlib.sha256(), layout(weights)
    with target.open("wb") as file:
        for place, weight in zip(places, weights, strict=True):
            content = _content(folder, weight)
            padding = bytes(-len(content) % ALIGNMENT_BYTES)
            for piece in (content, padding):
                digest.update(piece)
            if np.frombuffer(content, np.uint8).any():  # keep the holes of sparse test models
                file.seek(place.offset)
                file.write(content)
            progress(f"{target.stem}: weights", place.offset + place.size_bytes, total, "bytes")
        file.truncate(total)
    return File(target.name, digest.hexdigest(), total)


def _content(folder: Path, weight: Weight) -> "memoryview[int]":
    dtype = np.dtype(f"u{ir.DataType[weight.dtype].numpy().itemsize}")
    parts = [_read(folder, source, dtype) for source in weight.sources]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole.reshape(-1).view(np.uint8).data


def _read(folder: Path, source: StoredTensor, dtype: np.dtype[Any]) -> np.ndarray:
    count = prod(source.shape)
    return np.fromfile(folder / source.location, dtype, count, offset=source.offset).reshape(source.shape)


def check_alike(weights: Mapping[str, Sequence[Weight]]) -> None:
    """Refuse components that share an engine but differ in a weight's name, dtype or shape.

    Raises:
        UserError: they differ.
    """
    (first, reference), *others = weights.items()
    for name, found in others:
        for ours, theirs in zip(reference, found, strict=False):
            if ours.layout != theirs.layout:
                remedy = "export both with the same options"
                raise UserError(f"{theirs.layout} of {name}", f"{ours.layout} of {first}", remedy)
