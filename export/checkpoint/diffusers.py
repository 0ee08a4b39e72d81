"""The layout of diffusers' pipelines, ``Wan-AI/Wan2.2-*-Diffusers`` (wan22.md §1.3): a folder with a configuration for
every part, under the names of diffusers and transformers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from export.checkpoint.keys import diffusers_names
from export.checkpoint.part_files import AGAIN, read_config
from export.checkpoint.sampling import stated_sampling
from export.checkpoint.spec import (
    Layers,
    Parts,
    Size,
    Tensors,
    assembled,
    dit_from_shapes,
    experts_of,
    lies_in,
    refuse_differing,
    release_of,
    release_that_takes,
    text_encoder_from_shapes,
    vae_from_shapes,
)
from wan22.errors import UserError
from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.specs import ModelSpec

NAME = "diffusers"
MODEL_INDEX = "model_index.json"
TOKENIZER = "tokenizer"


class ModelIndex(msgspec.Struct):
    """``model_index.json``."""

    transformer_2: tuple[str | None, str | None] = (None, None)
    expand_timesteps: bool | None = None


class TransformerConfig(msgspec.Struct):
    """``transformer/config.json``."""

    attention_head_dim: Size
    ffn_dim: Size
    in_channels: Size
    num_attention_heads: Size
    num_layers: Layers
    out_channels: Size
    text_dim: Size = 4096
    freq_dim: Size = 256
    eps: float = 1e-6


class VaeConfig(msgspec.Struct):
    """``vae/config.json``; older releases state only what distinguishes them."""

    z_dim: Size
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    base_dim: Size = 96
    decoder_base_dim: Size | None = None
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: Layers = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False


class TextEncoderConfig(msgspec.Struct):
    """``text_encoder/config.json`` of transformers."""

    d_model: Size
    d_ff: Size
    d_kv: Size
    num_heads: Size
    num_layers: Layers
    vocab_size: Size
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: float = 1e-6


def expert_folder(expert: str) -> str:
    return "transformer_2" if expert == "low_noise" else "transformer"


def recognise(names: Iterable[str]) -> bool:
    return MODEL_INDEX in names


def parts(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    two = _read_index(folder).transformer_2[0] is not None or "low_noise" in given
    experts = ("high_noise", "low_noise") if two else ("dit",)
    own = [expert for expert in experts if expert not in given]
    for expert in own:
        if not (folder / expert_folder(expert)).is_dir():
            found = f"{folder / expert_folder(expert) / 'config.json'}: No such file"
            what = expert.replace("_", "-")
            raise UserError(f"{found}, the {what} expert is missing", f"what {MODEL_INDEX} names", AGAIN)
    if own:
        _read_transformers(folder, own)
    places = {expert: expert_folder(expert) for expert in experts}
    places |= {"text_encoder": "text_encoder", "vae": "vae", "tokenizer": TOKENIZER}
    return {part: folder / place for part, place in places.items()}


def spec(folder: Path, parts: Parts) -> ModelSpec:
    experts = experts_of(parts)
    vae, text = _vae(folder, parts["vae"]), _text_encoder(folder, parts["text_encoder"])
    own = [expert for expert in experts if lies_in(folder, parts[expert])]
    dit = _dit(_read_transformers(folder, own)) if own else dit_from_shapes(parts[experts[0]])
    expands = _read_index(folder).expand_timesteps  # some tools omit it
    base = release_of(dit)
    if own and expands is not None:
        base = release_that_takes(clean_first_frame=expands, condition=dit.condition_channels > 0)
    found = assembled(base, len(experts), dit, text, vae)
    return replace(found, sampling=stated_sampling(folder / MODEL_INDEX, found))


def _dit(config: TransformerConfig) -> DitSpec:
    return DitSpec(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        width=config.num_attention_heads * config.attention_head_dim,
        ffn_width=config.ffn_dim,
        layers=config.num_layers,
        heads=config.num_attention_heads,
        freq_width=config.freq_dim,
        text_width=config.text_dim,
        eps=config.eps,
    )


def names(part: str, spec: ModelSpec) -> dict[str, str]:
    found = {theirs: name for name, theirs in diffusers_names(part, spec).items()}
    if part == "text_encoder":  # transformers saves the embedding under one or both of two names
        found["encoder.embed_tokens.weight"] = found["shared.weight"]
    return found


def _read_index(folder: Path) -> ModelIndex:
    index: ModelIndex = read_config(folder / MODEL_INDEX, ModelIndex)
    return index


def _read_transformers(folder: Path, experts: Sequence[str]) -> TransformerConfig:
    paths = [folder / expert_folder(expert) / "config.json" for expert in experts]
    configs: list[TransformerConfig] = [read_config(path, TransformerConfig) for path in paths]
    refuse_differing(paths, configs)
    return configs[0]


def _text_encoder(folder: Path, tensors: Tensors) -> TextEncoderSpec:
    if not lies_in(folder, tensors):
        return text_encoder_from_shapes(tensors)
    config: TextEncoderConfig = read_config(folder / "text_encoder" / "config.json", TextEncoderConfig)
    return TextEncoderSpec(
        width=config.d_model,
        ffn_width=config.d_ff,
        layers=config.num_layers,
        heads=config.num_heads,
        vocab=config.vocab_size,
        head_width=config.d_kv,
        buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        eps=config.layer_norm_epsilon,
    )


def _vae(folder: Path, tensors: Tensors) -> VaeSpec:
    if not lies_in(folder, tensors):
        return vae_from_shapes(tensors)
    config: VaeConfig = read_config(folder / "vae" / "config.json", VaeConfig)
    return VaeSpec(
        generation="2.2" if config.is_residual else "2.1",
        latent_channels=config.z_dim,
        encoder_base=config.base_dim,
        decoder_base=config.decoder_base_dim or config.base_dim,
        latents_mean=config.latents_mean,
        latents_std=config.latents_std,
        multipliers=config.dim_mult,
        blocks_per_stage=config.num_res_blocks,
        temporal_down=config.temperal_downsample,
    )
