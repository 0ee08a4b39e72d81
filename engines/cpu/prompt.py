"""Split off the part of a graph that depends on the prompt only and is therefore the same in every step of a video.

The keys and values of the text and, for short prompts, their product with the linear after cross-attention are computed
once per prompt; ``wan-trt bench`` reports the extra time of the first forward. On a GPU at full size their share is
negligible, so GPU engines remain a single graph.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engines.cpu.padding import TEXT

if TYPE_CHECKING:
    import onnx_ir as ir

BOOLEAN = frozenset({"LessOrEqual"})  # all other values passed between the halves are float32


def split_at_prompt(model: "ir.Model") -> "tuple[ir.Model, ir.Model] | None":
    """Split ``model`` in two: everything computed from ``text`` alone, and a step that continues from there.

    The outputs of the first graph are inputs of the second, with the same names; the second has no input ``text``. The
    weights stay in their files. None if nothing depends on the text alone.
    """
    import onnx_ir as ir

    graph = model.graph
    boundary = _boundary(graph)
    if not boundary:
        return None
    for number, value in enumerate(boundary):
        value.name = f"prompt_{number:02d}"
        kind = getattr(value.producer(), "op_type", "")
        value.type = ir.TensorType(ir.DataType.BOOL if kind in BOOLEAN else ir.DataType.FLOAT)
    others = [value for value in graph.inputs if value.name != TEXT]
    halves = ([TEXT], boundary), ([*others, *boundary], list(graph.outputs))
    prompt, step = (ir.convenience.extract(graph, entering, leaving) for entering, leaving in halves)
    for half in (prompt, step):  # ``extract`` lists the weights in the order of a set, which differs between runs
        weights = sorted(half.initializers.items())
        half.initializers.clear()
        half.initializers.update(weights)
    return ir.Model(prompt, ir_version=model.ir_version), ir.Model(step, ir_version=model.ir_version)


def _boundary(graph: "ir.Graph") -> "list[ir.Value]":
    """The values that depend on the text alone and that the rest of the graph reads."""
    varying = {value for value in graph.inputs if value.name != TEXT}
    of_text = {value for value in graph.inputs if value.name == TEXT}
    found: dict[ir.Value, None] = {}
    for node in graph:
        read = list(_read(node))
        if not varying.isdisjoint(read):
            varying.update(node.outputs)
            found |= dict.fromkeys(value for value in read if value in of_text and value.producer() is not None)
        elif not of_text.isdisjoint(read):
            of_text.update(node.outputs)
    return list(found)


def _read(node: "ir.Node") -> "Iterator[ir.Value]":
    """The node's inputs, and the values that its bodies and branches read."""
    import onnx_ir as ir

    yield from (value for value in node.inputs if value is not None)
    for entry in node.attributes.values():
        if entry.type == ir.AttributeType.GRAPH:
            for inner in entry.as_graph():
                yield from _read(inner)
