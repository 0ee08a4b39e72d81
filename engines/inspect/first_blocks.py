"""The first blocks of a graph, for looking at what a compiler makes of it without compiling all of it.

Blocks of a transformer are alike, so three of forty show every fusion in a tenth of the time and memory. Nodes carry
the path of their block ("blocks.3/..."); the one value that a block hands on is found by who uses it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir


def first_blocks(graph: Path, folder: Path, count: int) -> Path:
    """Writes the graph with only its first ``count`` blocks into ``folder``, its weights linked, not copied.

    Returns ``graph`` itself where it has no more blocks than that.

    Raises:
        UserError: the onnx-ir package is missing.
    """
    ir = _onnx_ir()
    model = ir.load(graph)
    blocks: dict[int, list[Any]] = {}
    for node in model.graph:
        if match := re.match(r"blocks\.(\d+)/", node.name or ""):
            blocks.setdefault(int(match[1]), []).append(node)
    if len(blocks) <= count:
        return graph
    last_kept, last = (_handed_on(blocks[index]) for index in (count - 1, max(blocks)))
    ir.convenience.replace_all_uses_with(last, last_kept)
    dropped = [node for index, nodes in blocks.items() if index >= count for node in nodes]
    model.graph.remove(dropped, safe=True)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    _link_weights(model, graph.parent, folder)
    ir.save(model, folder / graph.name)
    return folder / graph.name


def _handed_on(nodes: "list[ir.Node]") -> "ir.Value":
    """The one value of a block that nodes outside of it use."""
    inside = set(nodes)
    values = [value for node in nodes for value in node.outputs if any(use.node not in inside for use in value.uses())]
    if len(values) != 1:
        raise ValueError(f"{nodes[0].name}: the block hands on {len(values)} values, expected one")
    return values[0]


def _link_weights(model: "ir.Model", source: Path, folder: Path) -> None:
    ir = _onnx_ir()
    tensors = (value.const_value for value in model.graph.initializers.values())
    for location in {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        (folder / location).symlink_to((source / location).resolve())


def _onnx_ir() -> Any:
    try:
        import onnx_ir
    except ImportError:
        raise UserError("no module onnx_ir", "it to cut a graph", "pip install onnx-ir") from None
    return onnx_ir
