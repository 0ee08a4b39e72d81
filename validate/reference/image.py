"""The reference's path from an image to the transformer's image inputs.

Pixels are prepared as in the official code (wan22.md §6): torch's bicubic interpolation of the normalised tensor for
I2V, Pillow's Lanczos for TI2V. diffusers uses Lanczos for both, so only the later stages come from its image-to-video
pipeline: mask, encoding and normalisation.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from wan22.specs import Resizing

Found = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # video, mask, latents


def pixels(image: Image.Image, resizing: Resizing, size: tuple[int, int], fit: str) -> torch.Tensor:
    """An RGB image as ``[1, 3, H, W]`` of ``size`` (width, height), in about [-1, 1]."""
    if fit == "crop":
        return _tensor(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
    if resizing == "stretch":
        return functional.interpolate(_tensor(image), size=(size[1], size[0]), mode="bicubic", align_corners=False)
    scale = max(size[0] / image.width, size[1] / image.height)
    wide, high = round(image.width * scale), round(image.height * scale)
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    scaled = _tensor(image.resize((wide, high), Image.Resampling.LANCZOS))
    return scaled[:, :, top : top + size[1], left : left + size[0]]


def _tensor(image: Image.Image) -> torch.Tensor:
    """``[1, 3, H, W]`` in [-1, 1], by torchvision's arithmetic."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    return values.sub(0.5).div(0.5)[None]


def conditioning(vae: Any, frames: int, first: torch.Tensor, last: torch.Tensor | None, *, one_frame: bool) -> Found:
    """The video ``[1, 3, F, H, W]`` that diffusers encodes, its mask ``[1, 4, T, h, w]`` (I2V), its latents.

    The latents are ``[1, z, T, h, w]``, ``first`` and ``last`` ``[1, 3, H, W]``; ``frames`` is the length of the
    generated video. With ``one_frame`` only the image is encoded (TI2V): F = T = 1.
    """
    pipeline = _pipeline_class()(None, None, vae, None, expand_timesteps=one_frame)
    _, condition, *_ = pipeline.prepare_latents(
        first, 1, vae.config.z_dim, *first.shape[2:], frames, torch.float32, first.device, last_image=last
    )
    if one_frame:
        return first[:, :, None], None, condition
    video = torch.zeros(1, 3, frames, *first.shape[2:], device=first.device)
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    return video, condition[:, : -vae.config.z_dim], condition[:, -vae.config.z_dim :]


def _pipeline_class() -> Any:
    """Import the pipeline without transformers' warning about an image processor that Wan2.2 does not use."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from diffusers import WanImageToVideoPipeline
    finally:
        logging.set_verbosity(verbosity)
    return WanImageToVideoPipeline
