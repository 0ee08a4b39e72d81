"""Derive a model's spec from a checkpoint's configurations, or from shapes if there are none."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec

from export.files.decoded import Tensor
from wan22.errors import UserError
from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.specs import PATCH, PUBLISHED, T2V_A14B, TI2V_5B, ModelSpec, named_after_dimensions

RELEASED = {str(spec.task): spec for spec in PUBLISHED}  # by model_type
Size = Annotated[int, msgspec.Meta(gt=0)]
Layers = Annotated[int, msgspec.Meta(gt=0, le=1000)]
HEAD_WIDTH = 128
RELEASES = "a Wan2.2 T2V-A14B, I2V-A14B or TI2V-5B"

Parts = Mapping[str, Mapping[str, Tensor]]  # tensors by the name of their part, then by their own
Tensors = Mapping[str, Tensor]


def refuse_differing(paths: Sequence[Path], configs: Sequence[msgspec.Struct]) -> None:
    """Refuse experts of different structure, since they share one graph."""
    for path, config in zip(paths, configs, strict=True):
        for field in config.__struct_fields__:
            found, expected = getattr(config, field), getattr(configs[0], field)
            if found != expected:
                raise UserError(
                    f"{path}: {field} {found}", f"{expected} as in {paths[0]}", "use two experts of one model"
                )


def release_that_takes(*, clean_first_frame: bool, condition: bool) -> ModelSpec:
    """The release whose transformer has these inputs; other differences are refused later."""
    alike = [spec for spec in RELEASED.values() if spec.takes.clean_first_frame == clean_first_frame]
    return next((spec for spec in alike if (spec.takes.mask_channels > 0) == condition), alike[0])


def assembled(base: ModelSpec, experts: int, dit: DitSpec, text: TextEncoderSpec, vae: VaeSpec) -> ModelSpec:
    if experts != len(base.experts):
        found = f"{experts} transformer(s) of type {base.task}"
        if experts == 1:
            found += ": one expert only, or Wan2.1, whose tensors have the same names and shapes"
        raise UserError(found, f"{len(base.experts)}", f"use {RELEASES}, or name the other expert's file")
    channels = (vae.latent_channels + base.takes.condition_channels(vae.latent_channels), vae.latent_channels)
    if (dit.in_channels, dit.out_channels) != channels:
        found = f"transformer with {dit.in_channels} input and {dit.out_channels} output channels"
        raise UserError(found, f"{channels[0]} and {channels[1]} for {base.task} and this VAE", f"use {RELEASES}")
    if dit.text_width != text.width:
        raise UserError(f"text encoder of width {text.width}", f"{dit.text_width}", "use this model's text encoder")
    if dit.width % dit.heads or dit.head_width % 2:
        raise UserError(f"{dit.heads} heads for width {dit.width}", "an even width per head", "fix config.json")
    dit = replace(dit, time_rows=base.dit.time_rows)
    return named_after_dimensions(replace(base, dit=dit, text_encoder=text, vae=vae))


def experts_of(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part not in ("text_encoder", "vae"))


def lies_in(folder: Path, tensors: Tensors) -> bool:
    """True if a part was read from the checkpoint's folder, whose configuration describes it."""
    return any(tensor.path.is_relative_to(folder) for tensor in tensors.values())


def dit_from_shapes(tensors: Tensors) -> DitSpec:
    """The transformer with ``tensors``, under official names; all releases have heads of width 128."""
    width, channels = _shape("transformer", tensors, "patch_embedding.weight", 5)[:2]
    ffn_width = _shape("transformer", tensors, "blocks.0.ffn.0.weight", 2)[0]
    rows = _shape("transformer", tensors, "head.head.weight", 2)[0]
    return DitSpec(
        in_channels=channels,
        out_channels=rows // prod(PATCH),
        width=width,
        ffn_width=ffn_width,
        layers=len({match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.", name))}),
        heads=max(1, width // HEAD_WIDTH),
        freq_width=_shape("transformer", tensors, "time_embedding.0.weight", 2)[1],
        text_width=_shape("transformer", tensors, "text_embedding.0.weight", 2)[1],
    )


def release_of(dit: DitSpec) -> ModelSpec:
    """The release whose transformer has the channels of ``dit``."""
    first_frame = dit.in_channels == TI2V_5B.dit.in_channels
    return release_that_takes(clean_first_frame=first_frame, condition=dit.condition_channels > 0)


def text_encoder_from_shapes(tensors: Tensors) -> TextEncoderSpec:
    """The umt5 encoder with ``tensors``, under official names."""
    vocab, width = _shape("text_encoder", tensors, "token_embedding.weight", 2)
    inner, _ = _shape("text_encoder", tensors, "blocks.0.attn.q.weight", 2)
    ffn_width, _ = _shape("text_encoder", tensors, "blocks.0.ffn.fc1.weight", 2)
    buckets, heads = _shape("text_encoder", tensors, "blocks.0.pos_embedding.embedding.weight", 2)
    layers = len({match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.", name))})
    return TextEncoderSpec(width, ffn_width, layers, heads, vocab, head_width=inner // heads, buckets=buckets)


def vae_from_shapes(tensors: Tensors) -> VaeSpec:
    """The VAE with ``tensors``, under official names; nested stages identify generation 2.2."""
    nested = any(name.startswith("decoder.upsamples.0.upsamples.") for name in tensors)
    base = (TI2V_5B if nested else T2V_A14B).vae
    channels = _shape("vae", tensors, "conv2.weight", 5)[0]
    if channels != base.latent_channels:
        raise UserError(
            f"VAE {base.generation} of {channels} latent channels", f"{base.latent_channels}", f"use {RELEASES}"
        )
    encoder, decoder = (_shape("vae", tensors, f"{side}.conv1.weight", 5)[0] for side in ("encoder", "decoder"))
    return replace(base, encoder_base=encoder, decoder_base=decoder // base.multipliers[-1])


def _shape(part: str, tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        first = ", ".join(list(tensors)[:2])
        raise UserError(f"{part} has no {name} (but {first}, …)", f"the {part} of Wan2.2", f"use {RELEASES}")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{part}: {name} has shape {list(shape)}", f"{rank} dimensions", f"use {RELEASES}")
    return shape
