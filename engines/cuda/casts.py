"""Drop casts from 16 bits to float32 whose only purpose is to be cast back: V passes through none."""

from typing import TYPE_CHECKING

from engines.cpu.match import producer

if TYPE_CHECKING:
    import onnx_ir as ir

VIEWS = ("Reshape",)  # operators that move no data and keep the type


def drop_double_casts(model: "ir.Model") -> int:
    """Replace ``Cast(Reshape…(Cast(x, float32)), type of x)`` by ``Reshape…(x)``, in place; return their number.

    Exact: every 16-bit number is a float32 number. Shape operators between the casts are repeated in 16 bits.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    dropped = 0
    for back in [node for node in model.graph if node.op_type == "Cast"]:
        views, widened = _widened(back)
        if widened is None or not _is_exact(widened, back):
            continue
        value = widened.inputs[0]
        assert value is not None
        for view in reversed(views):
            node = ir.node(view.op_type, [value, *view.inputs[1:]], dict(view.attributes), name=f"{view.name}/narrow")
            model.graph.insert_before(back, node)
            node.outputs[0].type = value.type
            value = node.outputs[0]
        ir.convenience.replace_all_uses_with(back.outputs[0], value)
        dropped += 1
    if dropped:
        RemoveUnusedNodesPass()(model)
    return dropped


def _is_exact(widened: "ir.Node", back: "ir.Node") -> bool:
    """True if the casts go from 16 bits to float32 and back to the same type."""
    import onnx_ir as ir

    source = widened.inputs[0].dtype if widened.inputs[0] is not None else None
    narrow, wide = back.attributes["to"].as_int(), widened.attributes["to"].as_int()
    return source in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and narrow == source and wide == ir.DataType.FLOAT


def _widened(back: "ir.Node") -> "tuple[list[ir.Node], ir.Node | None]":
    """The shape operators above ``back``, from below, and the Cast above them."""
    views, value = [], back.inputs[0]
    while (node := value.producer() if value is not None else None) is not None and node.op_type in VIEWS:
        views.append(node)
        value = node.inputs[0]
    return views, producer(value, "Cast")
