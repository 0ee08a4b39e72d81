"""The passes for each part of a model, in the order of their dependencies."""

from typing import TYPE_CHECKING

from engines.cpu.attention import fuse_attention
from engines.cpu.bias import forward_value_biases, separate_biases
from engines.cpu.chunks import chunk_tokens
from engines.cpu.modulation import fold_modulation
from engines.cpu.padding import merge_padding
from engines.cpu.patches import multiply_patches
from engines.cpu.rms_norm import fuse_rms_norms
from engines.cpu.rotary import split_qkv
from engines.cpu.short_text import project_short_text
from engines.cpu.upsampling import convolve_before_doubling
from wan22.parts import DitSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def fit_transformer(model: "ir.Model", spec: DitSpec) -> None:
    """Rewrite the fp32 graph of a transformer for ONNX Runtime's CPU kernels, in place."""
    split = (spec.heads, spec.head_width)
    multiply_patches(model)
    if spec.time_rows == 1:
        fold_modulation(model)
    split_qkv(model, *split)
    fuse_rms_norms(model)
    fuse_attention(model, *split)
    forward_value_biases(model)
    merge_padding(model, *split)
    project_short_text(model, *split)
    separate_biases(model)
    if spec.time_rows == 1:
        chunk_tokens(model, spec.width)


def fit_decoder(model: "ir.Model") -> None:
    """Rewrite an fp32 graph of the VAE's decoder for ONNX Runtime's CPU kernels, in place."""
    convolve_before_doubling(model)
