"""Fold modulation into the scale and bias of the preceding LayerNormalization: one pass over the rows, not three."""

from typing import TYPE_CHECKING

from engines.cpu.match import climb, consumer, replace_value, shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir


def fold_modulation(model: "ir.Model") -> int:
    """Fold ``LayerNormalization(x, ones) · scale + shift`` into one operator, in place; return their number.

    Scale and shift must be one row ``[1, D]`` for all tokens: the blend of two rows (TI2V) stays unchanged.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    folded = 0
    for norm in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        ones = norm.inputs[1].const_value if norm.inputs[1] is not None else None
        if len(norm.inputs) != 2 or ones is None or not (ones.numpy() == 1).all():
            continue
        scaled = consumer(norm, "Mul")
        shifted = consumer(scaled, "Add")
        if scaled is not None and shifted is not None and not any(map(_is_blend, scaled.inputs)):
            _replace(model.graph, norm, scaled, shifted)
            folded += 1
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def _is_blend(rows: "ir.Value | None") -> bool:
    """True for a sum of two products: rows that a mask blends, one per token."""
    return all(climb(rows, ("Add", index), ("Mul", 0)) is not None for index in (0, 1))


def _replace(graph: "ir.Graph", norm: "ir.Node", scaled: "ir.Node", shifted: "ir.Node") -> None:
    import onnx_ir as ir

    flat = shape_constant(graph, [-1])
    (scale,) = (value for value in scaled.inputs if value is not norm.outputs[0])
    (shift,) = (value for value in shifted.inputs if value is not scaled.outputs[0])
    parts = {"scale": scale, "shift": shift}
    rows = [ir.node("Reshape", [value, flat], name=f"{norm.name}/{name}") for name, value in parts.items()]
    inputs = [norm.inputs[0], *(row.outputs[0] for row in rows)]
    modulated = ir.node("LayerNormalization", inputs, dict(norm.attributes), name=f"{norm.name}/modulated")
    replace_value(graph, shifted.outputs[0], [*rows, modulated])
