"""What PyTorch computes from the same checkpoint: transformers' UMT5 encoder, diffusers' Wan transformers and VAE.

Their modules are filled from the project's own reading of the checkpoint, through its own key maps, strictly: a tensor
that is missing, left over or of another shape stops the load. diffusers' single-file loaders are no alternative, they
configure every Wan2.2 transformer as one of Wan2.1 (wan22.md §1.3). Everything is float32. Nothing here is shared with
the runtime, so that a mistake has to be made twice to go unseen.

One thing in diffusers is changed: the sinusoid of the timestep. The official code computes it in float64 (§2.3),
diffusers in float32, where the angle of t = 999 is already 3e-5 off. That alone moves a velocity by 1e-5 and would hide
as much of our own error, so the reference does as the official code does, and the ladder holds ours against both.
"""

import html
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.keys import diffusers_names, dit_config, text_encoder_config, vae_config
from wan22.progress import Progress, silent
from wan22.specs import TEXT_TOKENS

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Reference:
    """The PyTorch side of one checkpoint. Parts are loaded when first asked for; of the experts one at a time stays.

    Tensors enter and leave as numpy arrays: nobody outside needs torch.
    """

    def __init__(self, checkpoint: Checkpoint, progress: Progress = silent) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self._progress = progress
        self._parts: dict[str, Any] = {}

    def token_ids(self, prompt: str) -> I64:
        """``[1, tokens]``, at most 512 with the end mark, of the prompt cleaned as wan22.md §3 says."""
        if "tokenizer" not in self._parts:
            from transformers import AutoTokenizer

            self._parts["tokenizer"] = AutoTokenizer.from_pretrained(str(self.checkpoint.tokenizer))
        ids = self._parts["tokenizer"](_cleaned(prompt), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        return np.asarray([ids], np.int64)

    @torch.inference_mode()
    def embeddings(self, token_ids: I64) -> F32:
        """``[1, 512, text width]`` of ids ``[1, tokens]``: encoded with padding and mask, padded rows then zeroed."""
        tokens = token_ids.shape[1]
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
        ids[:, :tokens] = torch.from_numpy(token_ids)
        mask = (torch.arange(TEXT_TOKENS) < tokens).to(torch.int64)[None]
        hidden = self._part("text_encoder", _text_encoder)(input_ids=ids, attention_mask=mask).last_hidden_state
        return _numpy(hidden * mask[..., None])

    @torch.inference_mode()
    def velocity(self, expert: str, latents: F32, timestep: float, text: F32) -> F32:
        """``[1, z, T, h, w]`` from ``expert`` for ``timestep`` on the 0…1000 scale and text ``[1, 512, width]``."""
        for other in set(self.spec.experts) - {expert}:
            self._parts.pop(other, None)
        time = torch.tensor([timestep], dtype=torch.float32)
        inputs = {"hidden_states": torch.from_numpy(latents), "encoder_hidden_states": torch.from_numpy(text)}
        return _numpy(self._part(expert, _transformer)(timestep=time, return_dict=False, **inputs)[0])

    @torch.inference_mode()
    def decode(self, latents: F32) -> F32:
        """Frames ``[1, 3, F, H, W]`` in [-1, 1] of latents as the sampler leaves them, the whole video at once."""
        vae = self.spec.vae
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        latent = torch.from_numpy(latents) / (1 / std) + mean  # wan22.md §4.3
        return _numpy(self._part("vae", _autoencoder).decode(latent, return_dict=False)[0])

    def _part(self, name: str, build: Callable[[Checkpoint], Any]) -> Any:
        if name not in self._parts:
            with torch.device("meta"):
                module = build(self.checkpoint)
            _fill(module, self.checkpoint, name, self._progress)
            self._parts[name] = module.eval()
        return self._parts[name]


def _cleaned(prompt: str) -> str:
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()


def _text_encoder(checkpoint: Checkpoint) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**text_encoder_config(checkpoint.spec)))


def _transformer(checkpoint: Checkpoint) -> Any:
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = _arguments(dit_config(checkpoint.spec))
    module = WanTransformer3DModel(**config)
    module.condition_embedder.timesteps_proj = _Sinusoid(config["freq_dim"])
    with torch.device("cpu"):  # its tables are computed, not loaded
        module.rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
    return module


class _Sinusoid(torch.nn.Module):
    """Timesteps ``[B]`` to ``[B, width]``, as the official code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return sinusoid(timesteps, self.width)


def sinusoid(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """``[B, width]`` in float32, computed in float64: cosines, then sines (wan22.md §2.3)."""
    frequencies = torch.exp(torch.arange(width // 2, dtype=torch.float64) * (-math.log(10000) / (width // 2)))
    angles = timesteps.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def time_features(timesteps: F32 | I64, width: int) -> dict[str, F32]:
    """``[steps, width]`` in the official precision, float64, and as diffusers computes it, in float32."""
    from diffusers.models.embeddings import Timesteps

    times = torch.from_numpy(timesteps)
    own = Timesteps(num_channels=width, flip_sin_to_cos=True, downscale_freq_shift=0)
    return {"float64": _numpy(sinusoid(times, width)), "float32": _numpy(own(times.float()))}


def _autoencoder(checkpoint: Checkpoint) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_arguments(vae_config(checkpoint.spec)))


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _fill(module: Any, checkpoint: Checkpoint, part: str, progress: Progress) -> None:
    """Gives the meta tensors of ``module`` the checkpoint's values, as float32. Raises RuntimeError on any mismatch."""
    names, weights, state = diffusers_names(part, checkpoint.spec), checkpoint.weights[part], {}
    for done, (official, theirs) in enumerate(names.items(), 1):
        state[theirs] = torch.from_numpy(np.array(weights.read(official), np.float32))
        progress(f"reference {part}", done, len(names), "tensors")
    if "shared.weight" in state:  # transformers keeps the same tensor under a second name
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def _numpy(tensor: Any) -> F32:
    array: F32 = tensor.float().contiguous().numpy()
    return array
