"""Split joint q, k and v of self-attention into three linears, with ``RMSNormalization`` and ``RotaryEmbedding``.

The exported graphs compute q, k and v in one linear and rotate q and k together, from which TensorRT makes the fewest
kernels. ONNX Runtime would copy every part out of the joint rows and pass over q and k a dozen times. Three linears
read the same rows three times and copy nothing. Norms and rotation of 16-bit graphs stay in float32.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.cpu.match import before_cast, climb, number, producer, replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir

# From the rotated halves up to the normalised columns of the joint linear. Input 1 of the second Mul is the norm's
# weight, input 1 of the third its statistics.
PATH = [("Concat", 0), ("Sub", 0), ("Mul", 0), ("Split", 0), ("Mul", 0), ("Mul", 0)]
COLUMNS = [("Reshape", 0), ("Slice", 0), ("Gemm", 1)]
STATISTICS = [("Reshape", 0), ("Slice", 0), ("Reciprocal", 0), ("Sqrt", 0), ("Add", 1)]


@dataclass(frozen=True)
class _Found:
    gemm: "ir.Node"
    slice: "ir.Node"  # the columns of q and k
    halves: "ir.Node"  # the Split into rotated q and k
    norm_weights: "ir.Node"  # the Concat of both weights
    epsilon: float
    tables: "tuple[ir.Value, ir.Value]"  # cos, sin [..., head/2]


def split_qkv(model: "ir.Model", heads: int, head_width: int) -> int:
    """Split every joint q, k and v of the exported form, in place; return their number."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [match for node in model.graph if node.op_type == "Split" and (match := _match(node)) is not None]
    for match in found:
        _replace(model.graph, match, (heads, head_width))
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _match(halves: "ir.Node") -> _Found | None:
    path = climb(halves.inputs[0], *PATH)
    columns = climb(before_cast(path[-1].inputs[0]), *COLUMNS) if path is not None else None
    if path is None or columns is None:
        return None
    (joined, subtracted, times_cos, _, weighted, normed), (_, sliced, gemm) = path, columns
    weights, statistics = producer(weighted.inputs[1], "Concat"), climb(normed.inputs[1], *STATISTICS)
    tables = _tables(subtracted, producer(joined.inputs[1], "Add"), times_cos)
    parts = producer(gemm.inputs[1], "Concat")
    if weights is None or statistics is None or tables is None or parts is None or len(parts.inputs) != 3:
        return None
    return _Found(gemm, sliced, halves, weights, number(statistics[-1].inputs[1]), tables)


def _tables(subtracted: "ir.Node", added: "ir.Node | None", times_cos: "ir.Node") -> "tuple[ir.Value, ir.Value] | None":
    """The inputs cos and sin if the nodes compute ``a·cos - b·sin`` and ``a·sin + b·cos``, else None."""
    factors = [producer(value, "Mul") for node in (subtracted, added) if node is not None for value in node.inputs]
    if len(factors) != 4 or any(node is None for node in factors):
        return None
    (a, cos), (b, sin), *second = (tuple(node.inputs) for node in factors if node is not None)
    pair = producer(a, "Split")
    if second != [(a, sin), (b, cos)] or pair is None or [*pair.outputs] != [a, b] or times_cos is not factors[0]:
        return None
    reshaped = [producer(value, "Reshape") for value in (cos, sin)]
    entering = [node.inputs[0] for node in reshaped if node is not None and node.inputs[0] is not None]
    return (entering[0], entering[1]) if len(entering) == 2 else None


def _replace(graph: "ir.Graph", found: _Found, split: tuple[int, int]) -> None:
    import onnx_ir as ir

    heads, head_width = split
    q, k, v = (_linear(found.gemm, part, "qkv"[part]) for part in range(3))
    graph.insert_after(found.gemm, [q, k, v])
    cos, sin = (_table(graph, value, head_width // 2) for value in found.tables)
    by_head = shape_constant(graph, [-1, heads, head_width])
    for part, (linear, rotated) in enumerate(zip((q, k), found.halves.outputs, strict=True)):
        nodes = _norm_and_rotate(graph, found, part, (linear, cos, sin), split)
        (reshaped,) = (use.node for use in rotated.uses())
        back = ir.node("Reshape", [nodes[-1].outputs[0], by_head], name=f"{linear.name}/heads")
        replace_value(graph, reshaped.outputs[0], [*nodes, back])
    for use in list(found.gemm.outputs[0].uses()):
        if use.node.op_type == "Slice" and use.node is not found.slice:
            ir.convenience.replace_all_uses_with(use.node.outputs[0], v.outputs[0])


def _linear(gemm: "ir.Node", part: int, name: str) -> "ir.Node":
    import onnx_ir as ir

    joints = [producer(value, "Concat") for value in gemm.inputs[1:]]
    own = [joint.inputs[part] for joint in joints if joint is not None]
    return ir.node("Gemm", [gemm.inputs[0], *own], dict(gemm.attributes), name=f"{gemm.name}/{name}")


def _table(graph: "ir.Graph", table: "ir.Value", pairs: int) -> "ir.Value":
    """``[T, h, w, head/2] → [1, L, head/2]``, once for all blocks."""
    import onnx_ir as ir

    name = f"{table.name}/rows"
    for use in table.uses():
        if use.node.name == name:
            return use.node.outputs[0]
    node = ir.node("Reshape", [table, shape_constant(graph, [1, -1, pairs])], name=name)
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _norm_and_rotate(
    graph: "ir.Graph", found: _Found, part: int, operands: "tuple[ir.Node, ir.Value, ir.Value]", split: tuple[int, int]
) -> "list[ir.Node]":
    import onnx_ir as ir

    (linear, cos, sin), (heads, head_width) = operands, split
    name = str(linear.name)
    stored = found.norm_weights.inputs[part]
    weight = ir.node("Reshape", [stored, shape_constant(graph, [-1])], name=f"{name}/norm_weight")
    settings = {"axis": -1, "epsilon": found.epsilon}
    float32 = [] if found.gemm.outputs[0].dtype == ir.DataType.FLOAT else [_widen(linear)]
    x = (float32 or [linear])[0].outputs[0]
    norm = ir.node("RMSNormalization", [x, weight.outputs[0]], settings, name=f"{name}/norm")
    rows = shape_constant(graph, [1, -1, heads * head_width])
    row = ir.node("Reshape", [norm.outputs[0], rows], name=f"{name}/rows")
    settings = {"num_heads": heads, "interleaved": 1}
    turned = ir.node("RotaryEmbedding", [row.outputs[0], cos, sin], settings, name=f"{name}/rotary")
    return [*float32, weight, norm, row, turned]


def _widen(linear: "ir.Node") -> "ir.Node":
    import onnx_ir as ir

    return ir.node("Cast", [linear.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{linear.name}/float32")
