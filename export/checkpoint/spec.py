"""Which model a checkpoint is: its configs, and the shapes of its tensors where there is no config."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec

from export.checkpoint.layout import MODEL_INDEX, expert_folder
from export.checkpoint.part_files import read_config
from export.files.tensor_file import Stored
from wan22.errors import UserError
from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.specs import I2V_A14B, T2V_A14B, TEXT_TOKENS, TI2V_5B, ModelSpec, named_after_dimensions

RELEASED = {str(spec.task): spec for spec in (T2V_A14B, I2V_A14B, TI2V_5B)}  # by model_type
Size = Annotated[int, msgspec.Meta(gt=0)]
Layers = Annotated[int, msgspec.Meta(gt=0, le=1000)]
RELEASES = "a Wan2.2 T2V-A14B, I2V-A14B or TI2V-5B"


class OfficialConfig(msgspec.Struct):
    """``config.json`` of an official transformer; what it never states are constants of the release."""

    model_type: str
    dim: Size
    ffn_dim: Size
    in_dim: Size
    out_dim: Size
    num_heads: Size
    num_layers: Layers
    freq_dim: Size = 256
    text_len: Size = TEXT_TOKENS
    eps: float = 1e-6


class ModelIndex(msgspec.Struct):
    """``model_index.json`` of diffusers."""

    transformer_2: tuple[str | None, str | None] = (None, None)
    expand_timesteps: bool | None = False


class TransformerConfig(msgspec.Struct):
    """``transformer/config.json`` of diffusers."""

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
    """``vae/config.json`` of diffusers; older releases state only what distinguishes them."""

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


def official_spec(folder: Path, experts: tuple[str, ...], parts: Mapping[str, Mapping[str, Stored]]) -> ModelSpec:
    """The model in an official folder; ``parts`` are its tensors under official names."""
    paths = [folder / expert_folder(expert, "official") / "config.json" for expert in experts]
    configs = [read_config(path, OfficialConfig) for path in paths]
    _same(paths, configs)
    config, text = configs[0], text_encoder_from_shapes(parts["text_encoder"])
    if config.text_len != TEXT_TOKENS:
        raise UserError(f"{paths[0]}: text_len {config.text_len}", f"{TEXT_TOKENS}", f"use {RELEASES}")
    dit = DitSpec(
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        width=config.dim,
        ffn_width=config.ffn_dim,
        layers=config.num_layers,
        heads=config.num_heads,
        freq_width=config.freq_dim,
        text_width=text.width,
        eps=config.eps,
    )
    if config.model_type not in RELEASED:
        raise UserError(f"{paths[0]}: model_type {config.model_type}", ", ".join(RELEASED), f"use {RELEASES}")
    return _assembled(RELEASED[config.model_type], len(experts), dit, text, vae_from_shapes(parts["vae"]))


def diffusers_spec(folder: Path) -> ModelSpec:
    """The model in a -Diffusers folder, from its configs alone."""
    index: ModelIndex = read_config(folder / MODEL_INDEX, ModelIndex)
    paths = [folder / "transformer" / "config.json"]
    if index.transformer_2[0] is not None:
        paths.append(folder / "transformer_2" / "config.json")
    configs = [read_config(path, TransformerConfig) for path in paths]
    _same(paths, configs)
    config = configs[0]
    dit = DitSpec(
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
    base = _release(clean_first_frame=bool(index.expand_timesteps), condition=dit.condition_channels > 0)
    text = read_config(folder / "text_encoder" / "config.json", TextEncoderConfig)
    vae = read_config(folder / "vae" / "config.json", VaeConfig)
    return _assembled(base, len(configs), dit, _text_encoder(text), _vae(vae))


def _same(paths: list[Path], configs: list[msgspec.Struct]) -> None:
    """Both experts must be of one structure, since they share one graph."""
    for path, config in zip(paths, configs, strict=True):
        for field in config.__struct_fields__:
            found, expected = getattr(config, field), getattr(configs[0], field)
            if found != expected:
                raise UserError(
                    f"{path}: {field} {found}", f"{expected} as in {paths[0]}", "use two experts of one model"
                )


def _release(*, clean_first_frame: bool, condition: bool) -> ModelSpec:
    """The release that takes what this -Diffusers checkpoint takes; what else does not fit is refused later."""
    alike = [spec for spec in RELEASED.values() if spec.takes.clean_first_frame == clean_first_frame]
    return next((spec for spec in alike if (spec.takes.mask_channels > 0) == condition), alike[0])


def _assembled(base: ModelSpec, experts: int, dit: DitSpec, text: TextEncoderSpec, vae: VaeSpec) -> ModelSpec:
    if experts != len(base.experts):
        raise UserError(f"{experts} transformer(s) of type {base.task}", f"{len(base.experts)}", f"use {RELEASES}")
    channels = (vae.latent_channels + base.takes.condition_channels(vae.latent_channels), vae.latent_channels)
    if (dit.in_channels, dit.out_channels) != channels:
        found = f"transformer with {dit.in_channels} input and {dit.out_channels} output channels"
        raise UserError(found, f"{channels[0]} and {channels[1]} for {base.task} and this VAE", f"use {RELEASES}")
    if dit.text_width != text.width:
        raise UserError(f"text encoder of width {text.width}", f"{dit.text_width}", "use that of this model")
    if dit.width % dit.heads or dit.head_width % 2:
        raise UserError(f"{dit.heads} heads for width {dit.width}", "an even width per head", "mend config.json")
    dit = replace(dit, time_rows=base.dit.time_rows)
    return named_after_dimensions(replace(base, dit=dit, text_encoder=text, vae=vae))


def _text_encoder(config: TextEncoderConfig) -> TextEncoderSpec:
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


def _vae(config: VaeConfig) -> VaeSpec:
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


def text_encoder_from_shapes(tensors: Mapping[str, Stored]) -> TextEncoderSpec:
    """The umt5 encoder whose tensors, under official names, are ``tensors``; layers are counted."""
    vocab, width = _shape("text_encoder", tensors, "token_embedding.weight", 2)
    inner, _ = _shape("text_encoder", tensors, "blocks.0.attn.q.weight", 2)
    ffn_width, _ = _shape("text_encoder", tensors, "blocks.0.ffn.fc1.weight", 2)
    buckets, heads = _shape("text_encoder", tensors, "blocks.0.pos_embedding.embedding.weight", 2)
    layers = len({match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.", name))})
    return TextEncoderSpec(width, ffn_width, layers, heads, vocab, head_width=inner // heads, buckets=buckets)


def vae_from_shapes(tensors: Mapping[str, Stored]) -> VaeSpec:
    """The VAE whose tensors, under official names, are ``tensors``; 2.2 is told by its nested stages."""
    nested = any(name.startswith("decoder.upsamples.0.upsamples.") for name in tensors)
    base = (TI2V_5B if nested else T2V_A14B).vae
    channels = _shape("vae", tensors, "conv2.weight", 5)[0]
    if channels != base.latent_channels:
        raise UserError(
            f"VAE {base.generation} of {channels} latent channels", f"{base.latent_channels}", f"use {RELEASES}"
        )
    encoder, decoder = (_shape("vae", tensors, f"{side}.conv1.weight", 5)[0] for side in ("encoder", "decoder"))
    return replace(base, encoder_base=encoder, decoder_base=decoder // base.multipliers[-1])


def _shape(part: str, tensors: Mapping[str, Stored], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        first = ", ".join(list(tensors)[:2])
        raise UserError(f"{part} has no {name} (but {first}, …)", f"the {part} of Wan2.2", f"use {RELEASES}")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{part}: {name} has shape {list(shape)}", f"{rank} dimensions", f"use {RELEASES}")
    return shape
