"""Adding nodes to a graph one operator at a time."""

from typing import TYPE_CHECKING, Any

from engines.cpu.match import shape_constant

if TYPE_CHECKING:
    import onnx_ir as ir


class Writer:
    """Adds nodes before ``place``."""

    def __init__(self, graph: "ir.Graph", place: "ir.Node") -> None:
        self._graph, self._place = graph, place

    def __call__(self, kind: str, *inputs: "ir.Value | None", **attributes: Any) -> "ir.Value":
        import onnx_ir as ir

        node = ir.node(kind, list(inputs), attributes)
        self._graph.insert_before(self._place, node)
        return node.outputs[0]

    def integers(self, *values: int) -> "ir.Value":
        return shape_constant(self._graph, list(values))
