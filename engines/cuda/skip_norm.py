"""Add a block's output to the residual stream and normalise the sum in one kernel, ``SkipLayerNormalization``."""

from typing import TYPE_CHECKING

from engines.cpu.match import producer

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"


def fuse_skip_norms(model: "ir.Model") -> int:
    """Replace ``LayerNormalization(a + b)`` by one operator that also returns the sum, in place; return their number.

    Only over the last axis, and not for a sum with another LayerNormalization, which another pair has taken.
    """
    fused = 0
    for norm in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        added = producer(norm.inputs[0], "Add")
        if added is not None and norm.attributes["axis"].as_int() == -1:
            _replace(model.graph, added, norm)
            fused += 1
    if fused:
        model.opset_imports[DOMAIN] = 1
    return fused


def _replace(graph: "ir.Graph", added: "ir.Node", norm: "ir.Node") -> None:
    import onnx_ir as ir

    gamma, *beta = norm.inputs[1:]
    node = ir.node(
        "SkipLayerNormalization",
        [*added.inputs, gamma, *beta],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=DOMAIN,
        num_outputs=4,  # the norm, two statistics for training, the sum
        name=f"{norm.name}/skip",
    )
    graph.insert_before(norm, node)
    for old, new in ((norm.outputs[0], node.outputs[0]), (added.outputs[0], node.outputs[3])):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}/replaced"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for unused in node.outputs[1:3]:
        unused.name = ""
    graph.remove([norm, added], safe=True)
