"""Compute everything between two self-attentions in chunks of tokens that stay in a core's cache.

A linear over all tokens of a video streams its input and output from memory once for every few columns of its weights;
ONNX Runtime's product is a tenth slower there than on rows that fit the second-level cache, and norms, gates and
activations each pass over memory again. Only self-attention mixes tokens: everything between two self-attentions
becomes the body of a ``Scan`` over chunks of equal length, which neither copies nor pads. The weights stay in the outer
graph.
"""

from typing import TYPE_CHECKING

from engines.cpu.match import constant, shape_constant
from engines.cpu.patches import patches_of

if TYPE_CHECKING:
    import onnx_ir as ir

CHUNK_BYTES = 1200 * 1024 * 4  # residual stream of all cores together: fastest of 400, 600 and 1,200 rows
FEWEST_ROWS = 192  # with fewer, reading the weights costs more than the cache saves
ALIKE = frozenset({"Add", "Mul", "Gelu", "FastGelu", "LayerNormalization", "RMSNormalization", "RotaryEmbedding"})
LINEAR = frozenset({"Gemm", "FusedMatMul"})

Layout = tuple[int, ...]  # a shape with -1 for the token axis


def chunk_tokens(model: "ir.Model", width: int) -> int:
    """Move per-token computations into ``Scan`` nodes, in place; return the number of nodes.

    Runs after the other passes, on graphs with one timestep for all tokens. The graph computes the chunk length at run
    time: the greatest divisor of the number of tokens that fits, or all tokens if none does.
    """
    graph = model.graph
    pixels = patches_of(graph)
    if pixels is None:
        return 0
    tokens = pixels.outputs[0]
    trace = _TokenTrace(graph, pixels, width)
    regions = [nodes for nodes in trace.regions.values() if any(node.op_type in LINEAR for node in nodes)]
    rows = _rows(graph, tokens, width)
    for number, nodes in enumerate(regions):
        _scan(graph, nodes, trace.layouts, rows, f"chunks.{number}")
    graph.sort()
    return len(regions)


class _TokenTrace:
    """Values with a token axis, and the per-token nodes between two self-attentions that produce them."""

    def __init__(self, graph: "ir.Graph", pixels: "ir.Node", width: int) -> None:
        self._width = width
        self.layouts = _tables(graph)
        self.layouts[pixels.outputs[0]] = _target(pixels) or ()
        self.levels: dict[ir.Value | None, int] = dict.fromkeys(self.layouts, 0)  # number of preceding attentions
        self.regions: dict[int, list[ir.Node]] = {}
        for node in graph:
            if any(value in self.levels for value in _read(node)) and node.outputs[0] not in self.levels:
                self._add(node)

    def _add(self, node: "ir.Node") -> None:
        given = [value for value in _read(node) if value in self.levels]
        level = max(self.levels[value] for value in given)
        layout = self._layout(node) if all(value in self.layouts for value in given) else None
        all_tokens = node.op_type == "MultiHeadAttention" and node.inputs[1] in self.levels
        if layout is not None:
            self.layouts[node.outputs[0]] = layout
        if layout is not None and not all_tokens:
            self.regions.setdefault(level, []).append(node)
        else:
            level += 1
        self.levels |= dict.fromkeys(node.outputs, level)

    def _layout(self, node: "ir.Node") -> Layout | None:
        """The layout of the node's output; None unless the node is known to treat all tokens alike."""
        first = self.layouts.get(node.inputs[0]) if node.inputs else None
        if node.op_type in ALIKE:
            return first or self.layouts.get(node.inputs[1])
        if node.op_type == "Reshape":
            return _target(node)
        if node.op_type in LINEAR:  # with a stored, transposed weight
            weight = node.inputs[1].shape if node.inputs[1] is not None else None
            return (-1, int(weight.numpy()[0])) if weight is not None and "transB" in node.attributes else None
        # cross-attention, and the choice between its two forms together with the next linear
        return {"MultiHeadAttention": (1, -1, self._width), "If": (-1, self._width)}.get(node.op_type)


def _read(node: "ir.Node") -> "list[ir.Value | None]":
    """The node's inputs and the outer values that its branches read."""
    found = list(node.inputs)
    for branch in _branches(node):
        inside = set(branch)
        found += [value for inner in branch for value in inner.inputs if value and value.producer() not in inside]
    return found


def _branches(node: "ir.Node") -> "list[ir.Graph]":
    import onnx_ir as ir

    return [entry.as_graph() for entry in node.attributes.values() if entry.type == ir.AttributeType.GRAPH]


def _tables(graph: "ir.Graph") -> "dict[ir.Value | None, Layout]":
    """The layouts of cos and sin, which have one row per token."""
    tables = [value for node in graph if node.op_type == "RotaryEmbedding" for value in node.inputs[1:3]]
    found = {value: _target(node) for value in tables if value is not None and (node := value.producer()) is not None}
    return {value: layout for value, layout in found.items() if layout is not None}


def _target(node: "ir.Node") -> Layout | None:
    """The output layout of a Reshape that infers the token axis; None otherwise."""
    shape = node.inputs[1].const_value if node.op_type == "Reshape" and node.inputs[1] is not None else None
    layout = () if shape is None else tuple(int(size) for size in shape.numpy())
    return layout if layout.count(-1) == 1 else None


def _rows(graph: "ir.Graph", tokens: "ir.Value", width: int) -> "ir.Value":
    """The number of tokens per chunk, ``[1]``."""
    import numpy as np
    import onnx_ir as ir

    most = max(CHUNK_BYTES // (4 * width), FEWEST_ROWS)
    zero, numbers = shape_constant(graph, [0]), constant(graph, "chunks/rows", np.arange(FEWEST_ROWS, most + 1))
    count = ir.node("Shape", [tokens], {"start": 0, "end": 1}, name="chunks/tokens")
    rest = ir.node("Mod", [count.outputs[0], numbers], name="chunks/rest")
    divides = ir.node("Equal", [rest.outputs[0], zero], name="chunks/divides")
    divisors = ir.node("Where", [divides.outputs[0], numbers, zero], name="chunks/divisors")
    greatest = ir.node("ReduceMax", [divisors.outputs[0]], {"keepdims": 1}, name="chunks/greatest")
    none = ir.node("Equal", [greatest.outputs[0], zero], name="chunks/none")
    rows = ir.node("Where", [none.outputs[0], count.outputs[0], greatest.outputs[0]], name="chunks/fitting")
    graph.extend([count, rest, divides, divisors, greatest, none, rows])
    return rows.outputs[0]


# -- the Scan


def _scan(
    graph: "ir.Graph", nodes: "list[ir.Node]", layouts: "dict[ir.Value | None, Layout]", rows: "ir.Value", name: str
) -> None:
    """Replace ``nodes`` by a ``Scan`` over chunks."""
    import onnx_ir as ir

    inside = set(nodes) | {inner for node in nodes for branch in _branches(node) for inner in branch}
    made = [node.outputs[0] for node in nodes]
    leaving = [value for value in made if any(use.node not in inside for use in value.uses())]
    graph.remove(nodes)
    chunks = _entering(nodes, inside, layouts, name)
    # A Reshape at the end would cost a copy into the Scan's result, so its input becomes the result instead. Values
    # that are only reshaped bypass the Scan, because it can return only values that its body produces.
    results = {value: _before_reshapes(value, inside) for value in leaving}
    whole = {chunk: value for value, chunk in chunks.items()}
    outputs = [result for result in dict.fromkeys(results.values()) if result not in whole]
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    scan = ir.node(
        "Scan",
        [_split(graph, value, layouts[value], rows) for value in chunks],
        {"body": ir.Graph([*chunks.values()], outputs, nodes=nodes, name=name), "num_scan_inputs": len(chunks)},
        num_outputs=len(outputs),
        name=f"{name}/scan",
    )
    graph.append(scan)
    whole |= dict(zip(outputs, scan.outputs, strict=True))
    for value, result in results.items():  # all outer readers read the joined chunks in the value's layout
        shape = shape_constant(graph, [*layouts[value]])
        joined = ir.node("Reshape", [whole[result], shape], name=f"{value.name}/whole")
        graph.append(joined)
        layouts[joined.outputs[0]] = layouts[value]
        for use in [use for use in value.uses() if use.node not in inside]:
            use.node.replace_input_with(use.idx, joined.outputs[0])


def _entering(
    nodes: "list[ir.Node]", inside: "set[ir.Node]", layouts: "dict[ir.Value | None, Layout]", name: str
) -> "dict[ir.Value, ir.Value]":
    """Make ``nodes`` read chunks instead of outer values with a token axis; return value → chunk."""
    import onnx_ir as ir

    used = dict.fromkeys(value for node in nodes for value in node.inputs)
    entering = [value for value in used if value and value in layouts and value.producer() not in inside]
    kind = ir.TensorType(ir.DataType.FLOAT)
    chunks = {value: ir.Value(name=f"{name}/in_{n}", type=kind) for n, value in enumerate(entering)}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value in chunks:
                node.replace_input_with(index, chunks[value])
    return chunks


def _before_reshapes(value: "ir.Value", inside: "set[ir.Node]") -> "ir.Value":
    while (node := value.producer()) in inside and node.op_type == "Reshape" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _split(graph: "ir.Graph", value: "ir.Value", layout: Layout, rows: "ir.Value") -> "ir.Value":
    """``value`` split into chunks along a new first axis."""
    import onnx_ir as ir

    name = f"{value.name}/chunks"
    for use in value.uses():
        if use.node.name == name:
            return use.node.outputs[0]
    at = layout.index(-1)
    sizes = [shape_constant(graph, [-1, *layout[:at]]), rows, shape_constant(graph, [*layout[at + 1 :]])]
    shape = ir.node("Concat", sizes, {"axis": 0}, name=f"{name}_shape")
    chunks = ir.node("Reshape", [value, shape.outputs[0]], name=name)
    graph.extend([shape, chunks])
    return chunks.outputs[0]
