"""The modules of the reference: transformers' UMT5 encoder, diffusers' Wan transformers and VAE, all in float32.

Their weights come from the project's checkpoint reader and key maps. Loading is strict: it fails if a tensor is
missing, left over or of another shape. diffusers' single-file loaders cannot be used, because they configure every
Wan2.2 transformer as Wan2.1 (wan22.md §1.3).

One part of diffusers is replaced: the sinusoid of the timestep. The official code computes it in float64 (§2.3),
diffusers in float32, where the angle at t = 999 has an error of 3e-5. This shifts a velocity by 1e-5 and would hide an
error of ours of that size. So the reference follows the official code, and the ladder compares ours with both.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint.checkpoint import Checkpoint
from export.checkpoint.keys import diffusers_names, dit_config, text_encoder_config, vae_config
from wan22.progress import Progress
from wan22.specs import PATCH, ModelSpec

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def load_part(checkpoint: Checkpoint, name: str, progress: Progress) -> Any:
    """The module of ``name``: "text_encoder", "vae" or an expert. Raises RuntimeError if the weights do not fit."""
    build = {"text_encoder": _text_encoder, "vae": autoencoder}.get(name, transformer)
    with torch.device("meta"):
        module = build(checkpoint.spec)
    _fill(module, checkpoint, name, progress)
    return module.eval()


def _text_encoder(spec: ModelSpec) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**text_encoder_config(spec)))


def transformer(spec: ModelSpec) -> Any:
    """The module on the default device, with its tables on the CPU."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = _arguments(dit_config(spec))
    module = WanTransformer3DModel(**config)
    module.condition_embedder.timesteps_proj = _Sinusoid(config["freq_dim"])
    with torch.device("cpu"):  # the tables are computed, not loaded
        module.rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
    return module


class _Sinusoid(torch.nn.Module):
    """Timesteps ``[B]`` → ``[B, width]``, as in the official code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return sinusoid(timesteps, self.width)


def sinusoid(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines, then sines ``[B, width]`` (wan22.md §2.3), computed in float64 and rounded to float32."""
    numbers = torch.arange(width // 2, dtype=torch.float64, device=timesteps.device)
    frequencies = torch.exp(numbers * (-math.log(10000) / (width // 2)))
    angles = timesteps.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def time_features(timesteps: F32 | I64, width: int) -> dict[str, F32]:
    """Time features ``[steps, width]`` by precision: float64, as in the official code, and diffusers' float32."""
    from diffusers.models.embeddings import Timesteps

    times = torch.from_numpy(timesteps)
    own = Timesteps(num_channels=width, flip_sin_to_cos=True, downscale_freq_shift=0)
    return {"float64": to_numpy(sinusoid(times, width)), "float32": to_numpy(own(times.float()))}


def timesteps_of(
    spec: ModelSpec, shape: Sequence[int], timestep: float, *, clean_first_frame: bool = False
) -> torch.Tensor:
    """Timesteps ``[1]``, or per token ``[1, L]`` for TI2V, where a clean first frame has t = 0 (wan22.md §2.6).

    ``shape`` is the shape of the latents, ``[1, z, T, h, w]``.
    """
    if not spec.takes.clean_first_frame:
        return torch.tensor([timestep], dtype=torch.float32)
    frames, height, width = shape[2:]
    times = torch.full((frames, height // PATCH[1], width // PATCH[2]), timestep, dtype=torch.float32)
    if clean_first_frame:
        times[0] = 0
    return times.reshape(1, -1)


def autoencoder(spec: ModelSpec) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_arguments(vae_config(spec)))


def lower(module: Any, dtype: torch.dtype) -> None:
    """Convert ``module`` to ``dtype`` except the parts that its class keeps in float32, as ``from_pretrained`` does."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        keeps = any(part in name.split(".") for part in kept)
        parameter.data = parameter.data.to(torch.float32 if keeps else dtype)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _fill(module: Any, checkpoint: Checkpoint, part: str, progress: Progress) -> None:
    """Load the checkpoint's values, as float32, into the meta tensors of ``module``."""
    names, weights, state = diffusers_names(part, checkpoint.spec), checkpoint.weights[part], {}
    for done, (official, theirs) in enumerate(names.items(), 1):
        state[theirs] = torch.from_numpy(np.array(weights.read(official), np.float32))
        progress(f"reference {part}", done, len(names), "tensors")
    if "shared.weight" in state:  # transformers has a second name for the same tensor
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def to_numpy(tensor: Any) -> F32:
    array: F32 = tensor.float().cpu().contiguous().numpy()
    return array
