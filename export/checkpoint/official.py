"""The layout of the official releases, ``Wan-AI/Wan2.2-*`` (wan22.md §1.1).

The experts lie in folders of their own, the single transformer of the 5B in the root, each with a ``config.json``. Text
encoder and VAE are ``.pth`` files without a configuration: their structure is read off the tensors' shapes.
"""

from pathlib import Path

import msgspec

from export.checkpoint.part_files import AGAIN, read_config
from export.checkpoint.schema import part_tensors
from export.checkpoint.spec import (
    RELEASED,
    RELEASES,
    Layers,
    Parts,
    Size,
    assembled,
    refuse_differing,
    text_encoder_from_shapes,
    vae_from_shapes,
)
from wan22.errors import UserError
from wan22.parts import DitSpec
from wan22.specs import TEXT_TOKENS, ModelSpec

NAME = "official"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"


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


def expert_folder(expert: str) -> str:
    return "." if expert == "dit" else f"{expert}_model"


def vae_file(generation: str) -> str:
    """The file of a VAE of generation "2.1" or "2.2"."""
    return f"Wan{generation}_VAE.pth"


def recognise(folder: Path) -> bool:
    marks = (TEXT_ENCODER_FILE, "high_noise_model", "low_noise_model", "config.json")
    return any((folder / mark).exists() for mark in marks)


def parts(folder: Path) -> dict[str, Path]:
    two = any((folder / expert_folder(expert)).exists() for expert in ("high_noise", "low_noise"))
    experts = ("high_noise", "low_noise") if two else ("dit",)
    places = {expert: folder / expert_folder(expert) for expert in experts}
    return places | {"text_encoder": _text_encoder(folder), "vae": _vae(folder), "tokenizer": folder / TOKENIZER}


def _text_encoder(folder: Path) -> Path:
    path = folder / TEXT_ENCODER_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing", "the file of the official release", "name its root folder, or download it"
        )
    return path


def _vae(folder: Path) -> Path:
    """The VAE, whichever generation lies there."""
    for generation in ("2.1", "2.2"):
        if (path := folder / vae_file(generation)).is_file():
            return path
    raise UserError(f"{folder} has no {vae_file('2.1')} or {vae_file('2.2')}", "one of them", AGAIN)


def spec(folder: Path, parts: Parts) -> ModelSpec:
    experts = [part for part in parts if part not in ("text_encoder", "vae")]
    paths = [folder / expert_folder(expert) / "config.json" for expert in experts]
    configs = [read_config(path, OfficialConfig) for path in paths]
    refuse_differing(paths, configs)
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
    return assembled(RELEASED[config.model_type], len(experts), dit, text, vae_from_shapes(parts["vae"]))


def names(part: str, spec: ModelSpec) -> dict[str, str]:
    return {name: name for name in part_tensors(part, spec)}
