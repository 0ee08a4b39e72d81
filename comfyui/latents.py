"""Between ComfyUI's tensors and the engines' arrays.

ComfyUI's latents are not normalised: ``{"samples": tensor [batch, z, T, h, w]}``. Where noise is left in them, they are
divided by ``1 - sigma``. Its images are float tensors [frames, height, width, 3] from 0 to 1.
"""

from typing import Any

import numpy as np
import torch

from runtime.arrays import F32
from wan22.errors import UserError
from wan22.specs import ModelSpec
from wan_trt.diffusers.values import png_of

EXACT = "wan_trt"  # in a LATENT: see :func:`latent_of`


def checked(latent: dict[str, Any], spec: ModelSpec) -> F32:
    samples = latent["samples"].detach().cpu().float().numpy()
    if samples.ndim != 5 or samples.shape[1] != spec.vae.latent_channels:
        expected = f"[batch, {spec.vae.latent_channels}, frames, height, width] for {spec.name}"
        raise UserError(f"a latent of shape {list(samples.shape)}", expected, "use the latent node of this model")
    return samples


def _scales(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (np.array(values, np.float32) for values in (spec.vae.latents_mean, spec.vae.latents_std))
    return mean[:, None, None, None], std[:, None, None, None]


def normalised(samples: F32, spec: ModelSpec) -> F32:
    mean, std = _scales(spec)
    return (samples - mean) / std


def denormalised(latents: F32, spec: ModelSpec) -> F32:
    mean, std = _scales(spec)
    return (latents * std + mean).astype(np.float32)


def latent_of(latents: F32, spec: ModelSpec) -> dict[str, Any]:
    """ComfyUI's LATENT; beside its tensor the exact values, whose last bit the change of scale costs."""
    return {"samples": torch.from_numpy(denormalised(latents, spec)), EXACT: latents}


def exact(latent: dict[str, Any], spec: ModelSpec) -> F32:
    """The normalised latents, to the last bit if no node has changed them on the way."""
    samples, known = checked(latent, spec), latent.get(EXACT)
    if known is not None and np.array_equal(denormalised(known, spec), samples):
        return known
    return normalised(samples, spec)


def png(image: Any) -> bytes:
    """The first picture of an IMAGE."""
    encoded = png_of(image[0].permute(2, 0, 1), None, None)
    assert encoded is not None
    return encoded
