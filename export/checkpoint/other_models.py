"""Recognise unsupported models that share names with Wan2.2, by a key that only they have."""

import re
from collections.abc import Iterable

MARKS = (
    (r"vace_", "Wan VACE"),
    (r"face_adapter\.|motion_encoder\.|face_encoder\.", "Wan2.2 Animate"),
    (r"casual_audio_encoder\.|audio_injector\.|cond_encoder\.|frame_packer\.|trainable_cond_mask", "Wan2.2 S2V"),
    (r"control_adapter\.", "Wan2.2 Fun Camera"),
    (r"ref_conv\.", "Wan2.2 Fun Control"),
    (r"attn_op\.local_attn\.proj_l\.", "a model with sparse-linear attention (TurboDiffusion), another attention"),
    (r"img_emb\.|\.k_img\.|\.v_img\.|add_[kv]_proj\.|image_embedder\.", "Wan2.1 I2V, which also reads CLIP's image"),
    (r"double_blocks\.|single_blocks\.|single_transformer_blocks\.", "another model (Flux or HunyuanVideo)"),
    (r"\.(lora_[abdu]|lora\.|hada_|lokr_|dora_scale|diff_b)", "a LoRA"),
    (r"^(decoder\.block\.|lm_head)", "a whole umt5 with its decoder"),
)


def other_model(names: Iterable[str]) -> str:
    """The unsupported model or kind of file with tensors of these ``names``; "" if none is known."""
    for name in names:
        for pattern, model in MARKS:
            if re.search(pattern, name, re.IGNORECASE):
                return model
    return ""


def remedy_of(model: str) -> str:
    return "merge it into a checkpoint with --lora" if model == "a LoRA" else "use T2V-A14B, I2V-A14B or TI2V-5B"
