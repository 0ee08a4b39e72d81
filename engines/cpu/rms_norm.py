"""Fuse the norm of a cross-attention's q or k to ``RMSNormalization``: one pass over the rows instead of four."""

from typing import TYPE_CHECKING

from engines.cpu.match import before_cast, climb, consumer, number, producer, replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse_rms_norms(model: "ir.Model") -> int:
    """Fuse norms of the exported form, in place; return their number.

    The form: statistics of ``x [L, D]``, that is ``1 / Sqrt(ReduceMean(x · x) + eps)``, times ``x`` in heads, times a
    weight in heads. Joint norms of q and k have another form; :mod:`engines.cpu.rotary` handles them.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fused = 0
    for inverse in [node for node in model.graph if node.op_type == "Reciprocal"]:
        statistics = climb(inverse.inputs[0], ("Sqrt", 0), ("Add", 0), ("ReduceMean", 0), ("Mul", 0))
        scaled = consumer(consumer(inverse, "Reshape"), "Mul")
        weighted = consumer(scaled, "Mul")
        if statistics is None or scaled is None or weighted is None:
            continue
        in_heads, x = producer(before_cast(scaled.inputs[0]), "Reshape"), statistics[-1].inputs[0]
        if in_heads is None or x is None or in_heads.inputs[0] is not before_cast(x):
            continue
        _replace(model.graph, (x, in_heads.inputs[1]), number(statistics[1].inputs[1]), weighted)
        fused += 1
    if fused:
        RemoveUnusedNodesPass()(model)
    return fused


def _replace(
    graph: "ir.Graph", entering: "tuple[ir.Value, ir.Value | None]", epsilon: float, weighted: "ir.Node"
) -> None:
    import onnx_ir as ir

    (x, in_heads), name = entering, str(weighted.name)
    weight = ir.node("Reshape", [weighted.inputs[1], shape_constant(graph, [-1])], name=f"{name}/weight")
    inputs = [x, weight.outputs[0]]
    norm = ir.node("RMSNormalization", inputs, {"axis": -1, "epsilon": epsilon}, name=f"{name}/fused")
    back = ir.node("Reshape", [norm.outputs[0], in_heads], name=f"{name}/heads")
    replace_value(graph, weighted.outputs[0], [weight, norm, back])
