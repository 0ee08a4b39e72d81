"""What the prompt alone decides, in a graph of its own: it is the same in every step of a video.

Keys and values of the text, and its way through the linear behind cross-attention where the prompt is short, are
computed once a prompt: what the first forward of a prompt takes longer than those after it, as ``wan-trt bench`` prints
it. On a GPU at full size they are next to nothing, so that engines for one stay a single graph.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engines.cpu.padding import TEXT

if TYPE_CHECKING:
    import onnx_ir as ir

BOOLEAN = frozenset({"LessOrEqual"})  # what else is handed over is float32


def split_at_prompt(model: "ir.Model") -> "tuple[ir.Model, ir.Model] | None":
    """``model`` as two: from ``text`` to what follows from nothing else, and the step that starts there.

    The outputs of the first are inputs of the second, under the same names; ``text`` is no input of the second.
    The weights stay where they are. None where nothing is made of the text alone.
    """
    import onnx_ir as ir

    graph = model.graph
    decided = _decided(graph)
    if not decided:
        return None
    for number, value in enumerate(decided):
        value.name = f"prompt_{number:02d}"
        kind = getattr(value.producer(), "op_type", "")
        value.type = ir.TensorType(ir.DataType.BOOL if kind in BOOLEAN else ir.DataType.FLOAT)
    others = [value for value in graph.inputs if value.name != TEXT]
    halves = ([TEXT], decided), ([*others, *decided], list(graph.outputs))
    prompt, step = (_sorted(ir.convenience.extract(graph, entering, leaving)) for entering, leaving in halves)
    return ir.Model(prompt, ir_version=model.ir_version), ir.Model(step, ir_version=model.ir_version)


def _sorted(graph: "ir.Graph") -> "ir.Graph":
    """With its weights sorted by name: ``extract`` lists them in the order of a set, which no two runs share."""
    weights = sorted(graph.initializers.items())
    graph.initializers.clear()
    graph.initializers.update(weights)
    return graph


def _decided(graph: "ir.Graph") -> "list[ir.Value]":
    """What the rest of the graph reads of what the text alone decides."""
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
    """Its inputs, and what its bodies and branches read."""
    import onnx_ir as ir

    yield from (value for value in node.inputs if value is not None)
    for entry in node.attributes.values():
        if entry.type == ir.AttributeType.GRAPH:
            for inner in entry.as_graph():
                yield from _read(inner)
