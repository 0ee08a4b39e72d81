"""Attention as the operator that ONNX Runtime's CUDA provider runs as flash attention.

``Attention`` of opset 23 does from ONNX Runtime 1.25 on (its ``core/providers/cuda/llm/attention.cc``), for bfloat16
and float16, compute capability 8.0 and later, heads of a multiple of 8 up to 256, q, k and v of one head size, no mask
and no past. Rows of tokens ``[1, L, heads · head]`` go to the kernel as they are; ``[1, heads, L, head]`` would be
transposed. The contrib ``MultiHeadAttention`` has no bfloat16 kernel, and ``GroupQueryAttention`` is causal.
"""

from typing import TYPE_CHECKING

from engines.cpu.attention import replace_attention

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_ONNXRUNTIME = (1, 25)


def fuse_attention(model: "ir.Model", heads: int, head_width: int) -> int:
    """Replace every attention of the exported form by one operator, in place; return their number."""
    settings = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0}
    return replace_attention(model, (heads, head_width), ("Attention", ""), settings)
