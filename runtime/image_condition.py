"""Inputs of image to video: the size of the video, the image in that size, mask and condition (§6).

The official code treats the requested size as a pixel budget: the video keeps the image's aspect ratio and has about
that area. I2V stretches the image to the grid, TI2V covers the grid and crops the rest. This module differs in two
ways. Unless ``exact_official`` is set, the grid is computed in integers, because the official floating-point floor
turns an 832x480 image into 832x464. And ``fit="crop"`` gives exactly the requested size for any image.
"""

from collections.abc import Callable
from math import isqrt
from typing import Literal

import numpy as np
from PIL import Image

from runtime.arrays import F32
from runtime.bicubic import resize_bicubic
from wan22.errors import UserError
from wan22.specs import POSITIONS, ModelSpec, Resizing

Fit = Literal["official", "crop"]
Size = tuple[int, int]  # width, height in pixels


def video_size(
    spec: ModelSpec, image: Size, wanted: Size, fit: Fit = "official", *, exact_official: bool = False
) -> Size:
    """The size of the video for an image of size ``image``.

    Raises:
        UserError: ``wanted`` is off the model's grid, or no grid has the image's extreme aspect ratio.
    """
    spec.check_size(*wanted)
    if fit == "crop":
        return wanted
    area, multiple = wanted[0] * wanted[1], spec.size_multiple
    cover = spec.takes.resizing == "cover"
    grid = _best_size if cover else _area_size
    if exact_official:
        grid = _best_size_in_floats if cover else _area_size_in_floats
    width, height = grid(image, area, multiple)
    if min(width, height) < multiple or max(width, height) > multiple * POSITIONS:
        found = f"an image of {image[0]}x{image[1]} for a video of {wanted[0]}x{wanted[1]} pixels"
        raise UserError(found, "a less extreme aspect ratio", "crop the image or use --fit crop")
    return width, height


def _area_size(image: Size, area: int, multiple: int) -> Size:
    """The size for I2V (§6.1): each side is the largest multiple below its exact value."""
    width, height = image
    step = multiple**2
    return multiple * isqrt(area * width // (height * step)), multiple * isqrt(area * height // (width * step))


def _area_size_in_floats(image: Size, area: int, multiple: int) -> Size:
    """The official computation for I2V, which floors by the VAE's stride and then by the patch."""
    ratio, stride = image[1] / image[0], multiple // 2
    width = np.sqrt(area / ratio) // stride // 2 * 2 * stride
    height = np.sqrt(area * ratio) // stride // 2 * 2 * stride
    return int(width), int(height)


def _best_size(image: Size, area: int, multiple: int) -> Size:
    """The size for TI2V (§6.2): round by width first or by height first, whichever is closer in aspect ratio."""
    return _closer(image, area, multiple, *_area_size(image, area, multiple))


def _best_size_in_floats(image: Size, area: int, multiple: int) -> Size:
    width = (area * (image[0] / image[1])) ** 0.5
    height = area / width
    return _closer(image, area, multiple, int(width // multiple) * multiple, int(height // multiple) * multiple)


def _closer(image: Size, area: int, multiple: int, width: int, height: int) -> Size:
    """Complete both grids to the area and choose the one closer in aspect ratio; a tie goes to ``height``."""
    if not (width and height):
        return width, height
    by_width = width, area // width // multiple * multiple
    by_height = area // height // multiple * multiple, height
    ratio = image[0] / image[1]

    def distance(size: Size) -> float:
        shape = size[0] / size[1]
        return max(ratio / shape, shape / ratio)

    return by_width if distance(by_width) < distance(by_height) else by_height


def fit_image(image: Image.Image, resizing: Resizing, size: Size, fit: Fit = "official") -> F32:
    """An RGB image as one frame ``[1, 3, 1, H, W]`` of ``size``, in [-1, 1] except for the overshoot of bicubic I2V."""
    if fit == "crop":
        pixels = _pixels(_crop(image, size))
    elif resizing == "cover":
        pixels = _pixels(_cover(image, size))
    else:
        pixels = resize_bicubic(_pixels(image), size[1], size[0])
    return pixels[None, :, None]


def _crop(image: Image.Image, size: Size) -> Image.Image:
    """The largest central region with the aspect ratio of ``size``, scaled to ``size``."""
    width = min(image.width, image.height * size[0] / size[1])
    height = min(image.height, image.width * size[1] / size[0])
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def _cover(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled to whole pixels so that it covers ``size``, then centre-cropped like in the official code."""
    scale = max(size[0] / image.width, size[1] / image.height)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - size[0]) // 2, (scaled.height - size[1]) // 2
    return scaled.crop((left, top, left + size[0], top + size[1]))


def _pixels(image: Image.Image) -> F32:
    """``[3, H, W]`` in [-1, 1], computed like torchvision's ``to_tensor`` and ``(x - 0.5) / 0.5``."""
    values = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
    values /= np.float32(255)
    values -= np.float32(0.5)
    values /= np.float32(0.5)
    return values


def conditioning_video(first: F32, frames: int, last: F32 | None = None) -> F32:
    """The video ``[1, 3, F, H, W]`` that I2V encodes: the image, mid grey, and the last image if given (§6.1).

    Args:
        first: ``[1, 3, 1, H, W]``.
        frames: F.
        last: ``[1, 3, 1, H, W]``, for first-last-frame conditioning.

    Raises:
        UserError: a last image is given for a video of one frame.
    """
    _check_room(frames, has_last=last is not None)
    video = np.zeros((1, 3, frames, *first.shape[3:]), np.float32)
    video[:, :, :1] = first
    if last is not None:
        video[:, :, -1:] = last
    return video


def conditioning_mask(latent_frames: int, height: int, width: int, *, has_last: bool = False) -> F32:
    """The mask ``[1, 4, T, h, w]``: 1 for given pixel frames.

    The four channels are the pixel frames of a latent frame; frame 0 counts four times. A given last frame is therefore
    channel 3 of the last latent frame, like in diffusers.
    """
    _check_room(4 * latent_frames - 3, has_last=has_last)
    mask = np.zeros((1, 4, latent_frames, height, width), np.float32)
    mask[:, :, 0] = 1
    if has_last:
        mask[:, 3, -1] = 1
    return mask


def _check_room(frames: int, *, has_last: bool) -> None:
    if has_last and frames == 1:
        raise UserError("a last image for 1 frame", "at least 5 frames", "use more frames or omit the last image")


def i2v_condition(latents: F32, *, has_last: bool = False) -> F32:
    """The ``condition`` input, ``[1, 4 + z, T, h, w]``: the mask, then the encoded conditioning video."""
    mask = conditioning_mask(*latents.shape[2:], has_last=has_last)
    return np.concatenate([mask, latents], axis=1)


def condition_inputs(
    spec: ModelSpec,
    images: tuple[Image.Image | None, Image.Image | None],
    video: tuple[int, int, int],
    fit: Fit,
    encode: Callable[[F32], F32],
) -> dict[str, F32]:
    """The sampler's inputs from images: ``condition`` (I2V), ``first_frame`` (TI2V) or none.

    Args:
        spec: the model.
        images: the first image and the last one.
        video: width, height, frames.
        fit: how images are made that size.
        encode: frames ``[1, 3, F, H, W]`` to normalised latents.
    """
    first, last = images
    if first is None:
        return {}
    shape = spec.takes.resizing, video[:2], fit
    if spec.takes.clean_first_frame:
        return {"first_frame": encode(fit_image(first, *shape))}
    final = None if last is None else fit_image(last, *shape)
    latents = encode(conditioning_video(fit_image(first, *shape), video[2], final))
    return {"condition": i2v_condition(latents, has_last=last is not None)}
