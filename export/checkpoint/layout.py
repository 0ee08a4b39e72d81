"""The file names of the two published layouts of a Wan2.2 checkpoint (wan22.md §1.1, §1.3)."""

from typing import Literal

Layout = Literal["official", "diffusers"]

TRANSFORMER_STEM = "diffusion_pytorch_model"  # of the official experts, and of diffusers' transformers and VAE
TEXT_ENCODER_STEM = "model"  # of transformers
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"  # official
MODEL_INDEX = "model_index.json"  # what makes a folder one of diffusers


def expert_folder(expert: str, layout: Layout) -> str:
    """Where an expert's files lie within a checkpoint; the 5B has its single transformer in the official root."""
    if layout == "official":
        return "." if expert == "dit" else f"{expert}_model"
    return "transformer_2" if expert == "low_noise" else "transformer"


def tokenizer_folder(layout: Layout) -> str:
    return "google/umt5-xxl" if layout == "official" else "tokenizer"


def vae_file(generation: str) -> str:
    """The official file of a VAE of generation "2.1" or "2.2"."""
    return f"Wan{generation}_VAE.pth"


def index_file(stem: str) -> str:
    return f"{stem}.safetensors.index.json"
