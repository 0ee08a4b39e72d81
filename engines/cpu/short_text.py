"""Cross-attention with a short prompt: apply the output linear to the rows of text, not to the tokens of the video.

``(P V) W = P (V W)``: with ``r`` rows of text the linear costs ``heads · r`` instead of ``D`` columns per token, which
is less for short prompts. ``V W`` is computed once per prompt, head by head. The probabilities ``P`` are then small
enough to store, and since they sum to 1 in every head, each row of ``V W`` can include a share of the linear's bias.
Long prompts use the usual form.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.cpu.match import climb, constant, consumer, replace_value, shape_constant
from engines.cpu.padding import MODULE

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
BY_HEAD = {"transBatchA": 1, "transBatchB": 1, "transB": 1}  # a [rows, heads, n], b [columns, heads, n]
WIDE_Q = (("Reshape", 0), ("Pad", 0), ("Reshape", 0))  # the nodes that add the padding channel to q, and to k
WIDE_K = (("Reshape", 0), ("Concat", 0), ("Reshape", 0))


@dataclass(frozen=True)
class _Found:
    usual: "list[ir.Node]"  # the nodes from q to the linear
    q: "ir.Value"  # [1, L, D]
    k: "ir.Value"  # [1, r, D]
    v: "ir.Value"  # [1, r, D]
    logits: "ir.Value"  # addends for the padding, [1, r, heads, 1]


def project_short_text(model: "ir.Model", heads: int, head_width: int) -> int:
    """Make every cross-attention choose its form at run time, in place; return their number.

    Runs after :func:`engines.cpu.padding.merge_padding`.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention" and MODULE in str(node.name)]
    found = [match for node in attentions if (match := _match(node)) is not None]
    if not found:
        return 0
    short, addends = _add_shared(graph, found[0].logits, head_width)
    for match in found:
        projected = _project(graph, match, short, (heads, head_width))
        _choose(graph, match, (short, addends, projected), (heads, head_width))
    RemoveUnusedNodesPass()(model)
    graph.sort()
    return len(found)


def _match(attention: "ir.Node") -> _Found | None:
    by_token = consumer(attention, "Reshape")
    flat = consumer(by_token, "Reshape")
    linear = consumer(flat, "Gemm")
    queries, keys = (climb(value, *steps) for value, steps in zip(attention.inputs, (WIDE_Q, WIDE_K), strict=False))
    if by_token is None or flat is None or linear is None or queries is None or keys is None:
        return None
    q, k, v, logits = queries[-1].inputs[0], keys[-1].inputs[0], attention.inputs[2], keys[1].inputs[1]
    if q is None or k is None or v is None or logits is None:
        return None
    return _Found([*reversed(queries), attention, by_token, flat, linear], q, k, v, logits)


def _add_shared(graph: "ir.Graph", logits: "ir.Value", head_width: int) -> "tuple[ir.Value, ir.Value]":
    """A flag that is true for short prompts, and the addends ``[r]`` of the logits."""
    import onnx_ir as ir

    # r · (D + heads · r) operations per token instead of D · (D + r), plus the cost of unpacked weights
    most = shape_constant(graph, [head_width * 3 // 4])
    count = ir.node("Shape", [logits], {"start": 1, "end": 2}, name="short_text/rows")
    short = ir.node("LessOrEqual", [count.outputs[0], most], name="short_text/short")
    first = ir.node("Slice", [logits, *(shape_constant(graph, [n]) for n in (0, 1, 2))], name="short_text/first")
    addends = ir.node("Reshape", [first.outputs[0], shape_constant(graph, [-1])], name="short_text/addends")
    graph.extend([count, short, first, addends])
    return short.outputs[0], addends.outputs[0]


def _project(graph: "ir.Graph", found: _Found, short: "ir.Value", split: tuple[int, int]) -> "ir.Value":
    """Once per prompt: v times the linear's weight if the prompt is short, else v unchanged, which nothing reads."""
    import numpy as np
    import onnx_ir as ir

    linear, by_head = found.usual[-1], shape_constant(graph, [-1, *split])
    flat = shape_constant(graph, [-1, split[0] * split[1]])
    name, weight, bias = str(linear.name), linear.inputs[1], linear.inputs[2]
    product = _Branch(f"{name}/text")
    v, w = (product("Reshape", value, by_head) for value in (found.v, weight))
    share = product("Mul", bias, constant(graph, "short_text/share", np.float32(1 / split[0])))
    values = product("Reshape", product("FusedMatMul", v, w, domain=DOMAIN, **BY_HEAD), flat)
    product("Add", values, share)
    unused = _Branch(f"{name}/no_text")
    unused("Reshape", found.v, flat)
    branches = {"then_branch": product.graph(), "else_branch": unused.graph()}
    projected = ir.node("If", [short], branches, name=f"{name}/projected")
    graph.append(projected)
    return projected.outputs[0]


def _choose(
    graph: "ir.Graph", found: _Found, shared: "tuple[ir.Value, ir.Value, ir.Value]", split: tuple[int, int]
) -> None:
    """For every token: replace the usual nodes by a choice between them and their short form."""
    import onnx_ir as ir

    linear, (short, addends, projected) = found.usual[-1], shared
    name, by_head = str(linear.name), shape_constant(graph, [-1, *split])
    weight, bias = linear.inputs[1:]
    brief = _Branch(f"{name}/short")
    q, k = (brief("Reshape", value, by_head) for value in (found.q, found.k))
    scores = brief("Add", brief("FusedMatMul", q, k, domain=DOMAIN, **BY_HEAD), addends)
    side_by_side = brief("Transpose", brief("Softmax", scores, axis=-1), perm=[1, 0, 2])
    brief("Gemm", brief("Reshape", side_by_side, shape_constant(graph, [0, -1])), projected)
    usual = _Branch(f"{name}/long")
    usual("Add", usual("Gemm", found.usual[-2].outputs[0], weight, transB=1), bias)
    chosen = ir.node("If", [short], name=f"{name}/chosen", attributes={"then_branch": brief.graph()})
    replace_value(graph, linear.outputs[0], [chosen])
    graph.remove(linear, safe=True)
    graph.remove(found.usual[:-1])
    long = _graph([*found.usual[:-1], *usual.nodes], f"{name}/long")
    chosen.attributes.add(ir.AttrGraph("else_branch", long))


class _Branch:
    """The nodes of a branch in sequence; the last one's output is the branch's output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def __call__(self, kind: str, *inputs: "ir.Value | None", domain: str = "", **attributes: Any) -> "ir.Value":
        import onnx_ir as ir

        name = f"{self.name}/{len(self.nodes)}_{kind}"
        node = ir.node(kind, list(inputs), attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}:0"  # the default name could clash with an outer value
        self.nodes.append(node)
        return node.outputs[0]

    def graph(self) -> "ir.Graph":
        return _graph(self.nodes, self.name)


def _graph(nodes: "list[ir.Node]", name: str) -> "ir.Graph":
    import onnx_ir as ir

    result = nodes[-1].outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [result], nodes=nodes, name=name)
