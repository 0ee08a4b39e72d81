"""Map official keys to diffusers/transformers keys, and write the configs that belong to the latter.

The map is built from the schema, so it contains exactly the tensors of a spec; tests show a bijection onto the
``state_dict`` of diffusers' and transformers' modules. Shapes never differ (wan22.md §1.3, §1.4).
"""

import re
from typing import Any

from export.checkpoint.schema import part_tensors
from wan22.parts import VaeSpec
from wan22.specs import PATCH, ModelSpec

# All apply to every name, in this order. Official ``norm3`` (before cross-attention) is diffusers' ``norm2``; the norms
# that it swaps names with have no parameters.
_DIT = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".o.", ".to_out.0."),
    *((f".{name}.", f".to_{name}.") for name in "qkv"),
)
_TEXT_ENCODER = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1.layer."),
    (r"\.norm1\.", ".0.layer_norm."),
    (r"\.norm2\.", ".1.layer_norm."),
    (r"\.attn\.", ".0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".0.SelfAttention.relative_attention_bias."),
    (r"\.ffn\.gate\.0\.", ".1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".1.DenseReluDense.wo."),
)
_LLAMA_TEXT_ENCODER = (  # llama.cpp's, in GGUF
    (r"^token_embedding\.", "token_embd."),
    (r"^norm\.", "enc.output_norm."),
    (r"^blocks\.(\d+)\.", r"enc.blk.\1."),
    (r"\.norm1\.", ".attn_norm."),
    (r"\.norm2\.", ".ffn_norm."),
    (r"\.attn\.", ".attn_"),
    (r"\.pos_embedding\.embedding\.", ".attn_rel_b."),
    (r"\.ffn\.gate\.0\.", ".ffn_gate."),
    (r"\.ffn\.fc1\.", ".ffn_up."),
    (r"\.ffn\.fc2\.", ".ffn_down."),
)
_VAE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_names(part: str, spec: ModelSpec) -> dict[str, str]:
    """Official → diffusers (transformers for the text encoder) name of every tensor of a part.

    ``part`` is "dit" or an expert of ``spec``, "text_encoder" or "vae".
    """
    names = list(part_tensors(part, spec))
    if part == "text_encoder":
        return {name: _rewritten(name, _TEXT_ENCODER) for name in names}
    if part == "vae":
        return {name: _rewritten(_vae_blocks(name, spec.vae), _VAE) for name in names}
    return {name: _dit_name(name) for name in names}


def llama_names(spec: ModelSpec) -> dict[str, str]:
    """Official → llama.cpp's name of every tensor of the text encoder."""
    return {name: _rewritten(name, _LLAMA_TEXT_ENCODER) for name in part_tensors("text_encoder", spec)}


def _dit_name(name: str) -> str:
    for official, diffusers in _DIT:
        name = name.replace(official, diffusers)
    return name


def _rewritten(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _vae_blocks(name: str, spec: VaeSpec) -> str:
    """``name`` with the stages called as in diffusers; its encoder of 2.1 keeps the running number, all else nests."""
    if not spec.residual:
        name = name.replace(".downsamples.", ".down_blocks.")
        return re.sub(r"\.upsamples\.(\d+)\.", lambda m: _up_block(int(m[1]), spec), name)
    pattern = r"\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\."
    return re.sub(pattern, lambda m: _nested_block(m[1], int(m[2]), int(m[3]), spec), name)


def _up_block(number: int, spec: VaeSpec) -> str:
    stage, index = divmod(number, spec.blocks_per_stage + 2)
    module = f"resnets.{index}" if index <= spec.blocks_per_stage else "upsamplers.0"
    return f".up_blocks.{stage}.{module}."


def _nested_block(direction: str, stage: int, index: int, spec: VaeSpec) -> str:
    blocks = spec.blocks_per_stage + (direction == "up")
    module = f"resnets.{index}" if index < blocks else f"{direction}sampler"
    return f".{direction}_blocks.{stage}.{module}."


def dit_config(spec: ModelSpec) -> dict[str, Any]:
    """``transformer/config.json`` of diffusers' WanTransformer3DModel."""
    dit = spec.dit
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": dit.head_width,
        "cross_attn_norm": True,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_width,
        "freq_dim": dit.freq_width,
        "image_dim": None,
        "in_channels": dit.in_channels,
        "num_attention_heads": dit.heads,
        "num_layers": dit.layers,
        "out_channels": dit.out_channels,
        "patch_size": list(PATCH),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": dit.text_width,
    }


def vae_config(spec: ModelSpec) -> dict[str, Any]:
    """``vae/config.json`` of diffusers' AutoencoderKLWan."""
    vae = spec.vae
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": vae.encoder_base,
        "decoder_base_dim": vae.decoder_base if vae.residual else None,
        "dim_mult": list(vae.multipliers),
        "dropout": 0.0,
        "in_channels": 3 * vae.patch**2,
        "is_residual": vae.residual,
        "latents_mean": list(vae.latents_mean),
        "latents_std": list(vae.latents_std),
        "num_res_blocks": vae.blocks_per_stage,
        "out_channels": 3 * vae.patch**2,
        "patch_size": vae.patch if vae.residual else None,
        "scale_factor_spatial": vae.spatial_stride,
        "scale_factor_temporal": vae.temporal_stride,
        "temperal_downsample": list(vae.temporal_down),  # diffusers' own spelling
        "z_dim": vae.latent_channels,
    }


def text_encoder_config(spec: ModelSpec) -> dict[str, Any]:
    """``text_encoder/config.json`` of transformers' UMT5EncoderModel."""
    text = spec.text_encoder
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": text.ffn_width,
        "d_kv": text.head_width,
        "d_model": text.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": text.eps,
        "num_heads": text.heads,
        "num_layers": text.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": text.max_distance,
        "relative_attention_num_buckets": text.buckets,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": text.vocab,
    }
