"""Attention whose result is an output of its engine: its kernel writes there, without a copy behind it.

So it does where nothing has an axis for a batch of one. That form is for targets whose compiler was seen to fuse it:
TensorRT-RTX for SM89 and SM120. For SM80 and SM86 it would write the scores of all tokens by all tokens.
"""

import onnx_ir as ir

from engines.targets import Target
from wan22.component import BY_HEAD, Stage

FUSED_FOR = ("8.9", "12.0")  # compute capabilities


def writes_its_output(stage: Stage, target: Target | None) -> bool:
    """True if ``stage`` ends with attention, and its kernel for ``target`` can write the output."""
    ends_with_attention = any(tensor.name == BY_HEAD for tensor in stage.outputs)
    fused = target is not None and target.backend == "tensorrt-rtx" and target.compute_capability in FUSED_FOR
    return ends_with_attention and fused


def drop_batch(graph: ir.Graph) -> None:
    """Remove the axis of the batch from ``graph``, in place: nothing of a stage with attention else has one."""
    for node in [node for node in graph if node.op_type in ("Unsqueeze", "Squeeze")]:
        (made,), value = node.outputs, node.inputs[0]
        assert value is not None
        if made.is_graph_output():
            value.name, value.shape, value.type = made.name, made.shape, made.type
        made.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
