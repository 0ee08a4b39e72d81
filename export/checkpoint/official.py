"""The layout of the official releases, ``Wan-AI/Wan2.2-*`` (wan22.md §1.1).

Each expert has a folder, the single transformer of the 5B is in the root, each with a ``config.json``. Text encoder and
VAE are ``.pth`` files, or safetensors of the same stem, without a configuration: their structure follows from the
tensors' shapes.
"""

from collections.abc import Iterable, Mapping
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
    Tensors,
    assembled,
    dit_from_shapes,
    experts_of,
    lies_in,
    refuse_differing,
    release_of,
    text_encoder_from_shapes,
    vae_from_shapes,
)
from wan22.errors import UserError
from wan22.parts import DitSpec
from wan22.specs import TEXT_TOKENS, TI2V_5B, ModelSpec

NAME = "official"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TEXT_ENCODER_FILES = (TEXT_ENCODER_FILE, "models_t5_umt5-xxl-enc-bf16.safetensors")
TEXT_EMBEDDING = "text_embedding.0.weight"
TOKENIZER = "google/umt5-xxl"
TOKENIZERS = (TOKENIZER, "umt5-xxl")


class OfficialConfig(msgspec.Struct):
    """``config.json`` of an official transformer; values that it never contains are constants of the release."""

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


def recognise(names: Iterable[str]) -> bool:
    marks = ("high_noise_model/", "low_noise_model/", "config.json", *TEXT_ENCODER_FILES)
    return any(name in marks for name in names)


def parts(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    two = any((folder / expert_folder(expert)).exists() or expert in given for expert in ("high_noise", "low_noise"))
    experts = ("high_noise", "low_noise") if two else ("dit",)
    found = {expert: folder / expert_folder(expert) for expert in experts}
    if "text_encoder" not in given:
        found["text_encoder"] = _text_encoder(folder)
    if "vae" not in given:
        found["vae"] = _vae(folder, experts[0])
    return found | {
        "tokenizer": next((folder / name for name in TOKENIZERS if (folder / name).is_dir()), folder / TOKENIZER)
    }


def _text_encoder(folder: Path) -> Path:
    for name in TEXT_ENCODER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = f"{folder / TEXT_ENCODER_FILE} is missing"
    raise UserError(found, "the file of the official release", "name its root folder, or download it")


def _vae(folder: Path, expert: str) -> Path:
    """The VAE; of two that lie there, the one for the transformer's channels."""
    files = [(generation, folder / vae_file(generation)) for generation in ("2.1", "2.2")]
    files = [(g, path) for g, named in files for path in (named, named.with_suffix(".safetensors")) if path.is_file()]
    if not files:
        raise UserError(f"{folder} has no {vae_file('2.1')} or {vae_file('2.2')}", "one of them", AGAIN)
    config = folder / expert_folder(expert) / "config.json"
    if len({generation for generation, _ in files}) > 1 and config.is_file():
        wanted = "2.2" if read_config(config, OfficialConfig).in_dim == TI2V_5B.dit.in_channels else "2.1"
        files = [(generation, path) for generation, path in files if generation == wanted]
    return files[0][1]


def spec(folder: Path, parts: Parts) -> ModelSpec:
    experts, text = experts_of(parts), text_encoder_from_shapes(parts["text_encoder"])
    vae = vae_from_shapes(parts["vae"])
    own = [expert for expert in experts if lies_in(folder, parts[expert])]
    dits = [dit_from_shapes(parts[expert]) for expert in experts if expert not in own]
    paths = [folder / expert_folder(expert) / "config.json" for expert in own]
    configs = [read_config(path, OfficialConfig) for path in paths]
    refuse_differing(paths, configs)
    if not configs:
        return assembled(release_of(dits[0]), len(experts), dits[0], text, vae)
    if configs[0].text_len != TEXT_TOKENS:
        raise UserError(f"{paths[0]}: text_len {configs[0].text_len}", f"{TEXT_TOKENS}", f"use {RELEASES}")
    if configs[0].model_type not in RELEASED:
        raise UserError(f"{paths[0]}: model_type {configs[0].model_type}", ", ".join(RELEASED), f"use {RELEASES}")
    dit = _dit(configs[0], _text_width(parts[own[0]]) or text.width)
    return assembled(RELEASED[configs[0].model_type], len(experts), dit, text, vae)


def _text_width(tensors: Tensors) -> int:
    """The width of the text encoder for which a transformer was made; 0 without a text embedding."""
    shape = tensors[TEXT_EMBEDDING].shape if TEXT_EMBEDDING in tensors else ()
    return shape[1] if len(shape) == 2 else 0


def _dit(config: OfficialConfig, text_width: int) -> DitSpec:
    return DitSpec(
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        width=config.dim,
        ffn_width=config.ffn_dim,
        layers=config.num_layers,
        heads=config.num_heads,
        freq_width=config.freq_dim,
        text_width=text_width,
        eps=config.eps,
    )


def names(part: str, spec: ModelSpec) -> dict[str, str]:
    return {name: name for name in part_tensors(part, spec)}
