"""Convolve a doubled picture without doubling it.

The exported graphs repeat every pixel to 2×2 and convolve the result, which GPU compilers fuse. Because rows and
columns are repeated, a 3×3 convolution reads only 2×2 different pixels: each of a pixel's four results is a convolution
of the small picture with a 2×2 kernel whose taps are sums of the 3×3 kernel's. This takes 4/9 of the arithmetic and
never stores the doubled picture, the largest tensor of a decoder.
"""

from typing import TYPE_CHECKING

from engines.cpu.match import Writer, climb, consumer, ints, producer, replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir

PATH = (("Reshape", 0), ("Reshape", 0), ("Concat", 0), ("Concat", 0), ("Reshape", 0))
ROWS, COLUMNS = 3, 4  # axes of a kernel [O, C, 1, rows, columns]
AFTER_DOUBLED = (0, 1, 1, 0, 1, 1)  # padding of the exported convolution


def convolve_before_doubling(model: "ir.Model") -> int:
    """Rewrite every convolution of doubled pixels of the exported form, in place; return their number.

    The form: ``x [1, C, F, h, w]`` reshaped, joined with itself along rows and along columns, reshaped to
    ``[1, C, F, 2h, 2w]`` and convolved with ``[O, C, 1, 3, 3]``.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [(node, x) for node in model.graph if node.op_type == "Conv" and (x := _small_picture(node)) is not None]
    for conv, x in found:
        _replace(model.graph, conv, x)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _small_picture(conv: "ir.Node") -> "ir.Value | None":
    """The picture before doubling if ``conv`` is a 3×3 convolution of doubled pixels, else None."""
    path = climb(conv.inputs[0], *PATH)
    if path is None or ints(conv, "kernel_shape") != (1, 3, 3) or ints(conv, "pads") != AFTER_DOUBLED:
        return None
    by_column, by_row = path[2:4]
    joined = all(len({id(value) for value in node.inputs}) == 1 for node in (by_column, by_row))
    return path[4].inputs[0] if joined and consumer(path[0], "Conv") is conv else None


def _replace(graph: "ir.Graph", conv: "ir.Node", x: "ir.Value") -> None:
    """Compute an upper and a lower row from each row of pixels, each interleaved from its left and right pixels."""
    import onnx_ir as ir

    add, rows = Writer(graph, conv), []
    for lower, kernel in enumerate(_merge_taps(add, conv.inputs[1], ROWS)):
        pixels = []
        for right, taps in enumerate(_merge_taps(add, kernel, COLUMNS)):
            pads = (0, 1 - lower, 1 - right, 0, lower, right)
            pixel = add("Conv", x, taps, conv.inputs[2], kernel_shape=(1, 2, 2), strides=(1, 1, 1), pads=pads)
            pixels.append(add("Unsqueeze", add("Squeeze", pixel, add.integers(0)), add.integers(4)))
        row = add("Concat", *pixels, axis=4)
        rows.append(add("Reshape", row, add.integers(0, 0, 0, 1, -1)))
    picture = add("Concat", *rows, axis=3)
    result = ir.node("Reshape", [picture, _result_shape(graph, conv)], name=f"{conv.name}/doubled")
    replace_value(graph, conv.outputs[0], [result])


def _result_shape(graph: "ir.Graph", conv: "ir.Node") -> "ir.Value":
    """The shape that turns ``[O, F, h, 2, 2w]`` into ``[1, O, F, 2h, 2w]``; F is that of the exported graph."""
    before, bias = producer(conv.inputs[0], "Reshape"), conv.inputs[2]
    assert before is not None and before.inputs[1] is not None and before.inputs[1].const_value is not None
    assert bias is not None and bias.shape is not None
    frames = int(before.inputs[1].const_value.numpy()[2])
    return shape_constant(graph, [1, int(bias.shape.numpy()[0]), frames, -1, 0])


def _merge_taps(add: Writer, kernel: "ir.Value | None", axis: int) -> "tuple[ir.Value, ir.Value]":
    """A kernel's three taps summed to two, one per different pixel: for the first and for the second result."""
    first, middle, last = (
        add("Slice", kernel, add.integers(tap), add.integers(tap + 1), add.integers(axis)) for tap in range(3)
    )
    return (
        add("Concat", first, add("Add", middle, last), axis=axis),
        add("Concat", add("Add", first, middle), last, axis=axis),
    )
