"""Compute the padding of the text once instead of once per row.

Rows of zeros pad a prompt to 512. They take part in attention, all with the same key and value, so one row represents
``n`` of them if its logit is raised by ``log n``: ``n·exp(s) = exp(s + log n)``. The fused operator accepts no bias per
column unless it is stored for every token. So every head of q gets an extra channel of ones, and every head of k one
that is ``log n`` in the last row and 0 elsewhere.
"""

from typing import TYPE_CHECKING

from engines.cpu.match import Writer, constant, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir

TEXT, MODULE = "text", "/cross_attn/"  # name of the input; part of the names of cross-attention nodes


def merge_padding(model: "ir.Model", heads: int, head_width: int) -> int:
    """Cut the text ``[1, 512, width]`` after its first trailing row of zeros, in place.

    Returns the number of attentions that read it. Does nothing unless all of them are fused.
    """
    fused = [node for node in model.graph if node.op_type == "MultiHeadAttention" and MODULE in str(node.name)]
    text = next((value for value in model.graph.inputs if value.name == TEXT), None)
    if text is None or not fused or any(node.op_type == "Softmax" for node in model.graph):
        return 0
    logits = _shorten(model.graph, text, heads)
    for node in fused:
        _widen(model.graph, node, 0, None, (heads, head_width))
        _widen(model.graph, node, 1, logits, (heads, head_width))
    return len(fused)


def _shorten(graph: "ir.Graph", text: "ir.Value", heads: int) -> "ir.Value":
    """Replace ``text`` by the needed rows; return the addends of their logits ``[1, rows, heads, 1]``."""
    import numpy as np
    import onnx_ir as ir

    rows = (text.shape or ir.Shape([])).numpy()[1]
    readers = list(text.uses())
    add = Writer(graph, graph[0])
    zero, one, all_rows, batch, width = (add.integers(n) for n in (0, 1, rows, 1, 2))
    empty = add("Equal", add("ReduceL1", text, width, keepdims=0), constant(graph, "padding/nothing", np.float32(0)))
    numbers = constant(graph, "padding/numbers", np.arange(1, rows + 1)[None])
    last = add("ReduceMax", add("Where", empty, zero, numbers), batch, keepdims=0)
    kept = add("Min", add("Add", last, one), all_rows)
    short = add("Slice", text, zero, kept, one)
    for use in readers:
        use.node.replace_input_with(use.idx, short)
    count = add("Cast", add("Sub", add.integers(rows + 1), kept), to=int(ir.DataType.FLOAT))
    none = add("Expand", constant(graph, "padding/nothing", np.float32(0)), add("Sub", kept, one))
    column = add("Reshape", add("Concat", none, add("Log", count), axis=0), shape_constant(graph, [1, -1, 1, 1]))
    return add("Expand", column, shape_constant(graph, [1, 1, heads, 1]))


def _widen(
    graph: "ir.Graph", attention: "ir.Node", index: int, channel: "ir.Value | None", split: tuple[int, int]
) -> None:
    """Add one channel to every head of an input ``[1, rows, D]``: ``channel``, or ones if it is None."""
    import numpy as np

    heads, head_width = split
    add = Writer(graph, attention)
    by_head = add("Reshape", attention.inputs[index], shape_constant(graph, [1, -1, heads, head_width]))
    if channel is None:
        behind = constant(graph, "padding/behind", np.array([0] * 7 + [1]))  # one element after the last axis
        wide = add("Pad", by_head, behind, constant(graph, "padding/unit", np.float32(1)))
    else:
        wide = add("Concat", by_head, channel, axis=-1)
    attention.replace_input_with(index, add("Reshape", wide, shape_constant(graph, [1, -1, heads * (head_width + 1)])))
