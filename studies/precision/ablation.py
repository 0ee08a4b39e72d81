"""FP8 variants that no export makes: without one of its precautions.

The functions patch a written graph in place, before its weights are filled in.
"""

from collections.abc import Callable

import onnx_ir as ir

from export.graphs.builder import FLOAT, GraphBuilder

Patch = Callable[[GraphBuilder], None]


def keep_k_mean(g: GraphBuilder) -> None:
    """Quantise K of FP8 attention without subtracting its mean over the tokens."""
    for node in _nodes(g, "/smooth_k/", "Sub"):
        smooth = node.outputs[0]
        smooth.replace_all_uses_with(_before(smooth))
        g.graph.remove(node, safe=True)


def scale_v_per_tensor(g: GraphBuilder) -> None:
    """Quantise V of FP8 attention with one scale for all channels."""
    for node in _nodes(g, "/scale_v/", "ReduceMax"):
        node.replace_input_with(1, g.constant([0, 1, 2]))


def subtract_token_means(g: GraphBuilder) -> None:
    """Subtract the mean over the call's tokens from every FP8 linear's input; the rounded weights restore it."""
    means: dict[ir.Value, ir.Value] = {}
    made = {node.name: node.outputs[0] for node in g.graph}
    for key in [name.removesuffix(".weight_scale") for name in g.weights if name.endswith(".weight_scale")]:
        scope = key.replace(".", "/").replace("blocks/", "blocks.")
        product = made[f"{scope}/MatMul"]
        rows, matrix = _before(product), _before(_before(product, 1))
        if rows not in means:
            means[rows] = _centre(g, rows)
        returned = g.reshape(g.op("Gemm", means[rows], g.cast(matrix, FLOAT), transB=1), [-1])
        returned = g.mul(returned, g.weights[f"{key}.weight_scale"])
        bias = g.weights[f"{key}.bias"] if f"{key}.bias" in g.weights else made[f"{scope}/Concat"]
        readers = [(use.node, use.idx) for use in bias.uses()]
        _replace_in(readers, g.add(bias, returned))
    g.graph.sort()


def _centre(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    """Subtract the mean from the input that ``rows`` is quantised from; returns the mean ``[1, in]``."""
    divided = _before(_before(rows))
    x = _before(divided)
    readers = [(use.node, use.idx) for use in x.uses() if "/quantise/" in (use.node.name or "")]
    mean = g.op("ReduceMean", x, g.constant([0]), keepdims=1)
    _replace_in(readers, g.op("Sub", x, mean))
    return mean


def _before(value: ir.Value, index: int = 0) -> ir.Value:
    """Input ``index`` of the node that produces ``value``."""
    node = value.producer()
    entering = node.inputs[index] if node else None
    if entering is None:
        raise ValueError(f"{value.name} has no producer with the input that the patch expects")
    return entering


def _replace_in(readers: list[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in readers:
        node.replace_input_with(index, value)


def _nodes(g: GraphBuilder, scope: str, op: str) -> list[ir.Node]:
    return [node for node in g.graph if scope in (node.name or "") and node.op_type == op]
