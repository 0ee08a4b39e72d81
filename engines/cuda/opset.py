"""Declare the VAE's graphs in the opset whose ``Pad`` the CUDA provider has a kernel for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18  # its operators mean the same there as in the opset of the export


def lower_opset(model: "ir.Model") -> None:
    """Declare ``model`` in :data:`OPSET`, in place.

    Raises:
        ValueError: a node needs a later one (a bug: the VAE's graphs have none).
    """
    import onnx

    for node in model.graph:
        schema = onnx.defs.get_schema(node.op_type, OPSET)
        if unknown := node.attributes.keys() - schema.attributes.keys():
            raise ValueError(f"{node.name}: {node.op_type} of opset {OPSET} has no {', '.join(unknown)}")
    model.opset_imports[""] = OPSET
