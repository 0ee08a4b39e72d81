"""The passes for a transformer on the CUDA provider, in the order of their dependencies."""

from typing import TYPE_CHECKING

from engines.cpu.modulation import fold_modulation
from engines.cpu.rms_norm import fuse_rms_norms
from engines.cpu.rotary import split_qkv
from engines.cuda.attention import fuse_attention
from engines.cuda.casts import drop_double_casts
from engines.cuda.skip_norm import fuse_skip_norms
from engines.cuda.squares import check_no_squares
from wan22.parts import DitSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def fit_transformer(model: "ir.Model", spec: DitSpec, name: str = "the transformer") -> None:
    """Rewrite the 16-bit graph of a transformer for ONNX Runtime's CUDA kernels, in place.

    Raises:
        UserError: it still makes a matrix of tokens by tokens.
    """
    split = (spec.heads, spec.head_width)
    fold_modulation(model)
    split_qkv(model, *split)
    fuse_rms_norms(model)
    fuse_attention(model, *split)
    drop_double_casts(model)
    check_no_squares(model, name)  # before contrib operators, whose shapes ONNX does not infer
    fuse_skip_norms(model)
