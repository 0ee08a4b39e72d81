"""The patch embedding as a product: a kernel as wide as its stride is a linear on the pixels of a patch.

ONNX Runtime's convolution writes it channel by channel, which are then transposed to rows of tokens.
"""

from math import prod
from typing import TYPE_CHECKING

from engines.cpu.match import Writer, climb, consumer, ints, replaced

if TYPE_CHECKING:
    import onnx_ir as ir

BY_PATCH = (1, 3, 5, 0, 2, 4, 6)  # of C, T, t, H, h, W, w: the tokens first


def multiply_patches(model: "ir.Model") -> int:
    """Replaces every ``Conv`` of ``[1, C, T, h, w]`` into rows of patches, in place; returns how many."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    rows = (node for node in model.graph if node.op_type == "Transpose" and ints(node, "perm") == (1, 0))
    found = [(node, path[1]) for node in rows if (path := climb(node.inputs[0], ("Reshape", 0), ("Conv", 0)))]
    found = [(node, conv) for node, conv in found if _is_patching(conv)]
    for transpose, conv in found:
        _replace(model.graph, transpose, conv)
    RemoveUnusedNodesPass()(model)
    return len(found)


def patches_of(graph: "ir.Graph") -> "ir.Node | None":
    """The node that makes the rows ``[L, pixels of a patch]``, if the graph was rewritten."""
    transposes = [node for node in graph if node.op_type == "Transpose" and ints(node, "perm") == BY_PATCH]
    return consumer(transposes[0], "Reshape") if transposes else None


def _is_patching(conv: "ir.Node") -> bool:
    """Whether kernels neither overlap nor leave pixels out; padded or grouped ones have more attributes."""
    return {"strides", "kernel_shape"} == set(conv.attributes) and ints(conv, "strides") == ints(conv, "kernel_shape")


def _replace(graph: "ir.Graph", transpose: "ir.Node", conv: "ir.Node") -> None:
    """``[1, C, T·t, H·h, W·w]`` as ``[T·H·W, C·t·h·w]``, times the kernels."""
    import onnx_ir as ir

    video, kernels, bias = conv.inputs
    assert kernels is not None
    assert kernels.shape is not None
    width, channels, *patch = (int(size) for size in kernels.shape.numpy())
    (table,) = (value for value in graph.inputs if value.name == "rope_cos")  # [T, H, W, head/2]
    add = Writer(graph, conv)
    counts = [add("Shape", table, start=axis, end=axis + 1) for axis in range(3)]
    sides = [side for count, size in zip(counts, patch, strict=True) for side in (count, add.integers(size))]
    by_patch = add("Reshape", video, add("Concat", add.integers(channels), *sides, axis=0))
    turned = add("Transpose", by_patch, perm=BY_PATCH)
    pixels = add("Reshape", turned, add.integers(-1, channels * prod(patch)))
    matrix = add("Reshape", kernels, add.integers(width, -1))
    matrix.shape, matrix.type = ir.Shape([width, channels * prod(patch)]), kernels.type
    product = ir.node("Gemm", [pixels, matrix, bias], {"transB": 1}, name=f"{conv.name}/Gemm")
    replaced(graph, transpose.outputs[0], [product])
