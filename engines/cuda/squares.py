"""Refuse transformers that make a matrix of tokens by tokens, the sign of attention that was not fused.

At 75,600 tokens and 40 heads such a matrix has 457 GB in 16 bits. Shapes are inferred for one small video whose number
of tokens is no other size in the graph.
"""

from math import prod
from typing import TYPE_CHECKING, Any

from wan22.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

GRID = (7, 11, 13)  # frames, rows and columns of tokens: primes, whose product is no width of a model
SIZES = dict(zip(("frames", "rows", "columns"), GRID, strict=True)) | {"height": 2 * GRID[1], "width": 2 * GRID[2]}


def check_no_squares(model: "ir.Model", name: str) -> None:
    """Raises UserError if the transformer ``model`` makes a matrix of tokens by tokens or a tensor of unknown shape."""
    shapes = _shapes(model)
    grid = next(value for value in model.graph.inputs if value.name == "rope_cos").shape
    assert grid is not None
    tokens = prod(dim if isinstance(dim, int) else SIZES[str(dim.value)] for dim in grid[:3])
    for node in model.graph:
        for value in node.outputs:
            shape = shapes.get(str(value.name))
            if shape is None or shape.count(tokens) > 1:
                made = "a matrix of tokens by tokens" if shape else "a tensor of unknown shape"
                expected, remedy = "attention in one operator", "export again with wan-trt export"
                raise UserError(f"{name}: {node.op_type} {node.name} makes {made}", expected, remedy)


def _count_frames(graph: Any) -> None:
    """Make constants of the limits of ``Range``, which inference does not derive; it numbers the latent frames."""
    import onnx

    for number, node in enumerate(node for node in graph.node if node.op_type == "Range"):
        limit = onnx.helper.make_tensor(f"frames_{number}", onnx.TensorProto.INT64, [], [GRID[0]])
        graph.initializer.append(limit)
        node.input[1] = limit.name


def _shapes(model: "ir.Model") -> dict[str, tuple[int, ...]]:
    """The shape of every value for a video of :data:`GRID`."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = SIZES[dim.dim_param]
    _count_frames(proto.graph)
    found = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    known = {}
    for value in (*found.value_info, *found.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            known[value.name] = tuple(dim.dim_value for dim in dims)
    return known
