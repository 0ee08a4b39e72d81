"""Cut a graph to its first blocks, to inspect a compiler's result without compiling the whole graph.

All blocks of a transformer are alike, so three of forty show every fusion in a tenth of the time and memory. Nodes
carry the path of their block ("blocks.3/..."); a block's output is the one value that nodes outside of it read.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir


def first_blocks(graph: Path, folder: Path, count: int) -> Path:
    """Write the graph with only its first ``count`` blocks to ``folder``, with links to its weights.

    Returns the new path, or ``graph`` if it has no more than ``count`` blocks.

    Raises:
        UserError: the onnx-ir package is not installed.
    """
    try:
        import onnx_ir as ir
    except ImportError:
        raise UserError("onnx_ir is not installed", "it to shorten a graph", "pip install onnx-ir") from None
    model = ir.load(graph)
    blocks: dict[int, list[Any]] = {}
    for node in model.graph:
        if match := re.match(r"blocks\.(\d+)/", node.name or ""):
            blocks.setdefault(int(match[1]), []).append(node)
    if len(blocks) <= count:
        return graph
    last_kept, last = (_block_output(blocks[index]) for index in (count - 1, max(blocks)))
    ir.convenience.replace_all_uses_with(last, last_kept)
    dropped = [node for index, nodes in blocks.items() if index >= count for node in nodes]
    model.graph.remove(dropped, safe=True)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    tensors = (value.const_value for value in model.graph.initializers.values())
    for location in {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        (folder / location).symlink_to((graph.parent / location).resolve())
    ir.save(model, folder / graph.name)
    return folder / graph.name


def _block_output(nodes: "list[ir.Node]") -> "ir.Value":
    """The one value of a block that nodes outside of it read."""
    inside = set(nodes)
    values = [value for node in nodes for value in node.outputs if any(use.node not in inside for use in value.uses())]
    if len(values) != 1:
        raise ValueError(f"{nodes[0].name}: the block has {len(values)} outputs, expected one")
    return values[0]
