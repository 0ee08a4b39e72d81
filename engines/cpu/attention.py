"""Attention as ONNX Runtime's fused ``MultiHeadAttention``.

The exported graphs write attention as MatMul, Softmax, MatMul, which GPU compilers fuse. ONNX Runtime would store the
whole ``[heads, L, S]`` matrix of probabilities; its fused operator processes it in blocks that fit the cache
(FlashAttention) and takes q, k and v as rows of tokens, which also saves the transposes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engines.cpu.match import consumer, ints, producer, replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
BY_HEAD, TURNED, BY_TOKEN = (1, 0, 2), (1, 2, 0), (0, 2, 1, 3)  # orders of axes


def fuse_attention(model: "ir.Model", heads: int, head_width: int) -> int:
    """Replace every attention of the exported form by one operator, in place; return their number.

    The form: ``q, k, v [tokens, heads, head]``, each transposed by head and unsqueezed, ``Softmax(q kᵀ) v``, transposed
    back and squeezed to ``[tokens, heads, head]``. q is already scaled. Other forms of attention stay unchanged.
    """
    settings = {"num_heads": heads, "scale": 1.0}
    fused = replace_attention(model, (heads, head_width), ("MultiHeadAttention", DOMAIN), settings)
    if fused:
        model.opset_imports[DOMAIN] = 1
    return fused


def replace_attention(
    model: "ir.Model", split: tuple[int, int], operator: tuple[str, str], settings: Mapping[str, int | float]
) -> int:
    """Replace every attention by ``operator``, its type and domain, which takes rows of tokens; return their number."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fused, (kind, domain), (heads, head_width) = 0, operator, split
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        if (found := _match(softmax)) is None:
            continue
        (qkv, squeezed), name = found, softmax.name or "attention"
        flat = shape_constant(model.graph, [1, -1, heads * head_width])
        by_head = shape_constant(model.graph, [-1, heads, head_width])
        rows = [ir.node("Reshape", [value, flat], name=f"{name}/rows_{n}") for value, n in zip(qkv, "qkv", strict=True)]
        inputs = [row.outputs[0] for row in rows]
        attention = ir.node(kind, inputs, settings, domain=domain, name=f"{name}/fused")
        back = ir.node("Reshape", [attention.outputs[0], by_head], name=f"{name}/by_token")
        replace_value(model.graph, squeezed.outputs[0], [*rows, attention, back])
        fused += 1
    if fused:
        RemoveUnusedNodesPass()(model)
    return fused


def _match(softmax: "ir.Node") -> "tuple[list[ir.Value], ir.Node] | None":
    """q, k and v as rows of tokens, and the node that yields the result as rows of tokens."""
    scores, mixed = producer(softmax.inputs[0], "MatMul"), consumer(softmax, "MatMul")
    if scores is None or mixed is None:
        return None
    entering = [(scores.inputs[0], BY_HEAD), (scores.inputs[1], TURNED), (mixed.inputs[1], BY_HEAD)]
    qkv = [rows for value, order in entering if (rows := _rows(value, order)) is not None]
    transposed = consumer(mixed, "Transpose")
    ordered = transposed is not None and ints(transposed, "perm") == BY_TOKEN
    squeezed = consumer(transposed, "Squeeze") if ordered else None
    return (qkv, squeezed) if len(qkv) == len(entering) and squeezed is not None else None


def _rows(value: "ir.Value | None", order: tuple[int, ...]) -> "ir.Value | None":
    """The value before the Transpose in ``order`` and the Unsqueeze that produce ``value``; None for another form."""
    unsqueezed = producer(value, "Unsqueeze")
    transposed = producer(unsqueezed.inputs[0], "Transpose") if unsqueezed is not None else None
    return transposed.inputs[0] if transposed is not None and ints(transposed, "perm") == order else None
