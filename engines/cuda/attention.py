"""Attention as the operator that ONNX Runtime's CUDA provider runs as flash attention.

``Attention`` of opset 23 does from ONNX Runtime 1.25 on (its ``core/providers/cuda/llm/attention.cc``), for bfloat16
and float16, compute capability 8.0 and later, heads of a multiple of 8 up to 256, q, k and v of one head size, no mask
and no past. Rows of tokens ``[1, L, heads · head]`` go to the kernel as they are; ``[1, heads, L, head]`` would be
transposed. The contrib ``MultiHeadAttention`` has no bfloat16 kernel, and ``GroupQueryAttention`` is causal.
"""

from typing import TYPE_CHECKING

from engines.cpu.attention import match_attention
from engines.cpu.match import replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_ONNXRUNTIME = (1, 25)


def fuse_attention(model: "ir.Model", heads: int, head_width: int) -> int:
    """Replace every attention of the exported form by one operator, in place; return their number."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fused = 0
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        if (found := match_attention(softmax)) is not None:
            _replace(model.graph, softmax.name or "attention", found, (heads, head_width))
            fused += 1
    if fused:
        RemoveUnusedNodesPass()(model)
    return fused


def _replace(graph: "ir.Graph", name: str, found: "tuple[list[ir.Value], ir.Node]", split: tuple[int, int]) -> None:
    import onnx_ir as ir

    (qkv, squeezed), (heads, head_width) = found, split
    flat, by_head = (shape_constant(graph, shape) for shape in ([1, -1, heads * head_width], [-1, heads, head_width]))
    rows = [ir.node("Reshape", [value, flat], name=f"{name}/rows_{n}") for value, n in zip(qkv, "qkv", strict=True)]
    settings = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0}
    attention = ir.node("Attention", [row.outputs[0] for row in rows], settings, name=f"{name}/fused")
    back = ir.node("Reshape", [attention.outputs[0], by_head], name=f"{name}/by_token")
    replace_value(graph, squeezed.outputs[0], [*rows, attention, back])
