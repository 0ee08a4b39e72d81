"""Match exported forms in a graph for passes that replace them, and add nodes one operator at a time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def producer(value: "ir.Value | None", kind: str) -> "ir.Node | None":
    """The node that produces ``value`` if it is of ``kind``, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def consumer(node: "ir.Node | None", kind: str) -> "ir.Node | None":
    """The only reader of ``node``'s output if it is of ``kind``, else None."""
    uses = list(node.outputs[0].uses()) if node is not None else []
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == kind else None


def before_cast(value: "ir.Value | None") -> "ir.Value | None":
    """The value that a Cast produces ``value`` from, or ``value`` itself."""
    cast = producer(value, "Cast")
    return value if cast is None else cast.inputs[0]


def climb(value: "ir.Value | None", *steps: tuple[str, int]) -> "list[ir.Node] | None":
    """The nodes above ``value``. A step is a kind and the input to follow; None if a node has another kind."""
    found = []
    for kind, index in steps:
        node = producer(value, kind)
        if node is None or len(node.inputs) <= index:
            return None
        found.append(node)
        value = node.inputs[index]
    return found


def ints(node: "ir.Node", attribute: str) -> tuple[int, ...]:
    values: Any = node.attributes[attribute].as_ints()
    return tuple(values)


def number(value: "ir.Value | None") -> float:
    """The value of a one-element constant.

    Raises:
        ValueError: it is not one.
    """
    if value is None or value.const_value is None or value.const_value.size != 1:
        raise ValueError("expected a constant of one element")
    return float(value.const_value.numpy().reshape(()))


def shape_constant(graph: "ir.Graph", shape: list[int]) -> "ir.Value":
    """The initializer for a Reshape to ``shape``, shared by all such nodes."""
    import numpy as np

    return constant(graph, "shape_" + "x".join(map(str, shape)), np.array(shape, np.int64))


def constant(graph: "ir.Graph", name: str, array: Any) -> "ir.Value":
    """The initializer ``name``, created from ``array`` if the graph does not have it yet."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        graph.initializers[name] = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    return graph.initializers[name]


def replace_value(graph: "ir.Graph", old: "ir.Value", nodes: "list[ir.Node]") -> None:
    """Insert ``nodes`` after the producer of ``old``; all readers of ``old`` then read the last node's output."""
    import onnx_ir as ir

    node, new = old.producer(), nodes[-1].outputs[0]
    assert node is not None
    graph.insert_after(node, nodes)
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


class Writer:
    """Add nodes before ``place``."""

    def __init__(self, graph: "ir.Graph", place: "ir.Node") -> None:
        self._graph, self._place = graph, place

    def __call__(self, kind: str, *inputs: "ir.Value | None", **attributes: Any) -> "ir.Value":
        import onnx_ir as ir

        node = ir.node(kind, list(inputs), attributes)
        self._graph.insert_before(self._place, node)
        return node.outputs[0]

    def integers(self, *values: int) -> "ir.Value":
        return shape_constant(self._graph, list(values))
