"""The passes for graphs on the CUDA provider: those of a transformer in the order of their dependencies, the VAE's."""

from typing import TYPE_CHECKING

from engines.cpu.modulation import fold_modulation
from engines.cpu.patches import multiply_patches
from engines.cpu.rms_norm import fuse_rms_norms
from engines.cpu.rotary import split_qkv
from engines.cuda.attention import fuse_attention
from engines.cuda.casts import drop_double_casts
from engines.cuda.skip_norm import fuse_skip_norms
from engines.cuda.squares import check_no_squares
from wan22.parts import DitSpec

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18  # of the ``Pad`` that has a kernel; the VAE's operators mean the same there as in the export's opset


def fit_transformer(model: "ir.Model", spec: DitSpec, name: str = "the transformer") -> None:
    """Rewrite the 16-bit graph of a transformer for ONNX Runtime's CUDA kernels, in place.

    Raises:
        UserError: it still makes a matrix of tokens by tokens.
    """
    split = (spec.heads, spec.head_width)
    multiply_patches(model)  # older releases have no Conv of opset 22 in bfloat16
    fold_modulation(model)
    split_qkv(model, *split)
    fuse_rms_norms(model)
    fuse_attention(model, *split)
    drop_double_casts(model)
    check_no_squares(model, name)  # before contrib operators, whose shapes ONNX does not infer
    fuse_skip_norms(model)


def lower_opset(model: "ir.Model") -> None:
    """Declare the VAE's graph ``model`` in :data:`OPSET`, in place.

    Raises:
        ValueError: a node needs a later one (a bug: the VAE's graphs have none).
    """
    import onnx

    for node in model.graph:
        schema = onnx.defs.get_schema(node.op_type, OPSET)
        if unknown := node.attributes.keys() - schema.attributes.keys():
            raise ValueError(f"{node.name}: {node.op_type} of opset {OPSET} has no {', '.join(unknown)}")
    model.opset_imports[""] = OPSET
