"""The PyTorch reference: every tensor of a run, computed by PyTorch from the same checkpoint.

It shares no code with the runtime, so a mistake stays hidden only if both make it. The modules come from
:mod:`validate.reference.parts`. Tensors enter and leave as numpy arrays, so callers do not need torch.
"""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from export.checkpoint.checkpoint import Checkpoint
from validate.reference.checkpoint import stated_boundary
from validate.reference.device import Residence
from validate.reference.image import conditioning, pixels
from validate.reference.parts import F32, I64, load_part, timesteps_of, to_numpy
from validate.reference.precision import attention_of, dtype_of, lower_precision, onednn_convolutions
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.progress import Progress, silent
from wan22.specs import TEXT_TOKENS


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """The transformer's inputs that come from an image. All are None for text to video."""

    condition: F32 | None = None  # [1, 20, T, h, w], mask and encoded video (I2V)
    first_frame: F32 | None = None  # [1, z, 1, h, w], the encoded image (TI2V)


NO_IMAGE = ImageInputs()


@dataclass(frozen=True, eq=False)
class ImageCondition:
    """The tensors between an image and the transformer's image inputs."""

    video: F32  # [1, 3, F, H, W], the input of the VAE; F is 1 for TI2V
    mask: F32 | None  # [1, 4, T, h, w], I2V only
    latents: F32  # [1, z, T, h, w], normalised

    @property
    def image_inputs(self) -> ImageInputs:
        if self.mask is None:
            return ImageInputs(first_frame=self.latents)
        return ImageInputs(condition=np.concatenate([self.mask, self.latents], axis=1))


class Reference:
    """The PyTorch side of one checkpoint. Parts are loaded on first use; only one expert stays loaded.

    ``precisions`` holds the components that are not computed in float32; ``residence`` chooses the device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        progress: Progress = silent,
        precisions: Mapping[str, Precision] | None = None,
        residence: Residence | None = None,
    ) -> None:
        self.checkpoint, self.spec, self.boundary = checkpoint, checkpoint.spec, stated_boundary(checkpoint)
        self._progress, self._precisions = progress, precisions or {}
        self._residence = residence or Residence()
        self._parts: dict[str, Any] = {}

    def token_ids(self, prompt: str) -> I64:
        """Ids ``[1, tokens]`` of the cleaned prompt (wan22.md §3), at most 512 including the end token."""
        if "tokenizer" not in self._parts:
            from transformers import AutoTokenizer

            folder = self.checkpoint.tokenizer
            try:
                self._parts["tokenizer"] = AutoTokenizer.from_pretrained(str(folder))
            except OSError as error:  # the library takes a folder that it cannot read for a name of the hub
                raise UserError(f"{folder}: {error}", "a tokenizer that can be read", "check the disk") from error
        ids = self._parts["tokenizer"](_clean(prompt), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        return np.asarray([ids], np.int64)

    @torch.inference_mode()
    def embeddings(self, token_ids: I64) -> F32:
        """Embeddings ``[1, 512, text width]`` of ids ``[1, tokens]``, encoded with padding; padded rows are zero."""
        tokens = token_ids.shape[1]
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
        ids[:, :tokens] = torch.from_numpy(token_ids)
        mask = (torch.arange(TEXT_TOKENS) < tokens).to(torch.int64)[None]
        ids, mask = self._to_device(ids), self._to_device(mask)
        hidden = self._part("text_encoder")(input_ids=ids, attention_mask=mask).last_hidden_state
        return to_numpy(hidden * mask[..., None])

    def pixels(self, image: Image.Image, size: tuple[int, int], fit: str) -> F32:
        """An RGB image as ``[1, 3, H, W]`` of ``size`` (width, height), in about [-1, 1]."""
        return to_numpy(pixels(image, self.spec.takes.resizing, size, fit))

    @torch.inference_mode()
    def condition(self, first: F32, frames: int, last: F32 | None = None) -> ImageCondition:
        """The condition of a video of ``frames`` frames on its first frame ``[1, 3, H, W]`` and optionally its last."""
        one, other = (None if image is None else self._to_device(torch.from_numpy(image)) for image in (first, last))
        assert one is not None
        with onednn_convolutions():
            vae = self._part("vae", "vae_encoder_first")
            found = conditioning(vae, frames, one, other, one_frame=self.spec.takes.clean_first_frame)
        video, mask, latents = found
        return ImageCondition(to_numpy(video), None if mask is None else to_numpy(mask), to_numpy(latents))

    @torch.inference_mode()
    def velocity(
        self, expert: str, latents: F32, timestep: float, text: F32, image_inputs: ImageInputs = NO_IMAGE
    ) -> F32:
        """The velocity ``[1, z, T, h, w]`` of ``expert`` at ``timestep`` (0…1000) with text ``[1, 512, width]``."""
        for other in set(self.spec.experts) - {expert}:
            self._residence.release(self._parts.pop(other, None))
        precision = self.precision_of(expert)
        seen = latents if image_inputs.condition is None else np.concatenate([latents, image_inputs.condition], axis=1)
        entering, context = (self._to_device(torch.tensor(array, dtype=dtype_of(precision))) for array in (seen, text))
        clean = image_inputs.first_frame is not None
        time = self._to_device(timesteps_of(self.spec, latents.shape, timestep, clean_first_frame=clean))
        with attention_of(precision):
            return to_numpy(self._part(expert)(entering, time, context, return_dict=False)[0])

    @torch.inference_mode()
    def decode(self, latents: F32) -> F32:
        """Frames ``[1, 3, F, H, W]`` in [-1, 1] of the sampler's latents, decoded in one call."""
        vae = self.spec.vae
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        latent = torch.from_numpy(latents) / (1 / std) + mean  # wan22.md §4.3
        with onednn_convolutions():
            module = self._part("vae", "vae_decoder_first")
            return to_numpy(module.decode(self._to_device(latent.to(module.dtype)), return_dict=False)[0])

    def precision_of(self, component: str) -> Precision:
        return self._precisions.get(component, Precision.FP32)

    def _part(self, name: str, component: str = "") -> Any:
        """The module ``name`` in the precision of ``component``, which defaults to ``name``."""
        precision = self.precision_of(component or name)
        key = f"{name}, {precision}" if name == "vae" else name  # the VAE's halves may differ
        if key not in self._parts:
            self._parts[key] = lower_precision(load_part(self.checkpoint, name, self._progress), precision)
        return self._residence.place(self._parts[key])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._residence.device)


def _clean(prompt: str) -> str:
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()
