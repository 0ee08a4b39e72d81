"""Compute the patch embedding as a matrix product: with stride = kernel size it is a linear on a patch's pixels.

ONNX Runtime's convolution writes its result by channel and must then transpose it to rows of tokens.
"""

from math import prod
from typing import TYPE_CHECKING

from engines.cpu.match import Writer, climb, consumer, ints, replace_value

if TYPE_CHECKING:
    import onnx_ir as ir

BY_PATCH = (1, 3, 5, 0, 2, 4, 6)  # of C, T, t, H, h, W, w: tokens first


def multiply_patches(model: "ir.Model") -> int:
    """Replace every ``Conv`` from ``[1, C, T, h, w]`` to rows of patches, in place; return their number."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    rows = (node for node in model.graph if node.op_type == "Transpose" and ints(node, "perm") == (1, 0))
    found = [(node, path[1]) for node in rows if (path := climb(node.inputs[0], ("Reshape", 0), ("Conv", 0)))]
    # Kernels neither overlap nor skip pixels; padded or grouped convolutions have more attributes.
    found = [(node, conv) for node, conv in found if {"strides", "kernel_shape"} == set(conv.attributes)]
    found = [(node, conv) for node, conv in found if ints(conv, "strides") == ints(conv, "kernel_shape")]
    for transpose, conv in found:
        _replace(model.graph, transpose, conv)
    RemoveUnusedNodesPass()(model)
    return len(found)


def patches_of(graph: "ir.Graph") -> "ir.Node | None":
    """The node that produces the rows ``[L, pixels of a patch]``; None if the graph was not rewritten."""
    transposes = [node for node in graph if node.op_type == "Transpose" and ints(node, "perm") == BY_PATCH]
    return consumer(transposes[0], "Reshape") if transposes else None


def _replace(graph: "ir.Graph", transpose: "ir.Node", conv: "ir.Node") -> None:
    """Reshape ``[1, C, T·t, H·h, W·w]`` to ``[T·H·W, C·t·h·w]`` and multiply by the kernels."""
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
    replace_value(graph, transpose.outputs[0], [product])
