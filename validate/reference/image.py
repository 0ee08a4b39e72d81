"""From an image to what the transformer is given of it, in the words of the references.

Pixels are prepared as the official code does it (wan22.md §6): for I2V torch's own bicubic interpolation of the
normalised tensor, for TI2V Pillow's Lanczos. diffusers prepares them otherwise, with Lanczos for both, so it is asked
only from there on: mask, encoding and normalisation are those of its image-to-video pipeline.
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
    """What diffusers encodes ``[1, 3, F, H, W]``, its mask ``[1, 4, T, h, w]`` (I2V) and latents ``[1, z, T, h, w]``.

    ``first`` and ``last`` are ``[1, 3, H, W]``, ``frames`` those of the video to be made. With ``one_frame``
    the image alone is encoded (TI2V): F = T = 1.
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
    """Imported in silence: transformers warns of an image processor that Wan2.2 has no use for."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from diffusers import WanImageToVideoPipeline
    finally:
        logging.set_verbosity(verbosity)
    return WanImageToVideoPipeline
