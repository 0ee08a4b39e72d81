"""Arrays, torch's tensors and pictures, each made from the others. torch is used where it is there already."""

import io
import secrets
import sys
from collections.abc import Iterator
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.arrays import F32
from runtime.noise import standard_normal
from wan22.errors import UserError

MOST = 100_000  # of anything that is counted: beyond, a list of requests alone would fill the memory


def is_tensor(value: Any) -> bool:
    """Whether ``value``, or the first of a list, comes from torch."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return type(first).__module__.partition(".")[0] == "torch"


def check_numbers(**given: Any) -> None:
    """Refuse what is neither a number nor None."""
    for name, value in given.items():
        if not isinstance(value, Real | None):
            raise UserError(f"{name} {value!r}", "a number", "correct it")


def check_counts(**counts: int | None) -> None:
    """Refuse what is neither a whole number from 1 to ``MOST`` nor None."""
    for name, value in counts.items():
        if value is not None and not (isinstance(value, int) and 0 < value <= MOST):
            raise UserError(f"{name} {value!r}", f"a whole number from 1 to {MOST}", "correct it")


def texts_of(name: str, given: Any) -> list[str]:
    """The texts of one or a list. Raises UserError for anything else."""
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} {given!r}", "a text or a list of texts", "correct it")
    return texts


def as_array(values: Any) -> F32:
    """A float32 array on the host of any array or tensor of real numbers.

    Raises:
        UserError: something else.
    """
    try:
        if is_tensor(values):
            values = values.detach().cpu()
            values = (values if values.is_complex() else values.float()).numpy()  # numpy has no bfloat16
        if not np.iscomplexobj(values):
            return np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError, NotImplementedError):  # also what is sparse, or has no data
        pass
    kind = getattr(values, "dtype", type(values).__name__)
    raise UserError(f"latents of {kind}", "an array or a dense tensor of real numbers", "pass float32")


def as_tensor(values: F32) -> Any:
    """A torch tensor over the memory of ``values``."""
    return import_module("torch").from_numpy(values)


def png_of(image: Any, width: int | None, height: int | None) -> bytes | None:
    """An image as a request takes it, in PNG, stretched to the size by Lanczos as diffusers does.

    Args:
        image: a picture, a path, an array [height, width, 3] (bytes, or floats from 0 to 1) or a tensor
            [3, height, width] from 0 to 1; None gives None.
        width: pixels; None keeps the size.
        height: pixels.
    """
    if image is None:
        return None
    picture: Image.Image
    if isinstance(image, str | Path):
        picture = Image.open(image)
    elif isinstance(image, Image.Image):
        picture = image
    else:
        pixels = image.detach().cpu().numpy() if is_tensor(image) else np.asarray(image)
        pixels = np.squeeze(pixels)
        if is_tensor(image):
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise UserError(f"an image of shape {list(pixels.shape)}", "one picture in RGB", "give one per call")
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
    picture = picture.convert("RGB")
    if width is not None and height is not None and picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def frames_of(chunks: Iterator[F32]) -> F32:
    """[frames, height, width, 3] from 0 to 1."""
    video = np.concatenate([chunk[0] for chunk in chunks], axis=1)
    return np.ascontiguousarray((video / 2 + 0.5).clip(0, 1).transpose(1, 2, 3, 0), np.float32)


def noises_of(shape: tuple[int, ...], count: int, generator: Any, latents: Any) -> list[F32]:
    """Initial noise of every video: ``latents``, or what ``generator`` gives diffusers."""
    batch = (count, *shape[1:])
    if latents is not None:
        values = as_array(latents)
        if values.shape != batch:
            raise UserError(f"latents {list(values.shape)}", f"{list(batch)}", "leave them out, or draw that shape")
        return list(values[:, None])
    if isinstance(generator, list | tuple) and len(generator) != count:
        raise UserError(f"{len(generator)} generators", f"one, or {count} as videos", "give as many")
    if is_tensor(generator):
        torch = sys.modules["torch"]
        each = generator if isinstance(generator, list | tuple) else [generator]
        shapes = batch if len(each) == 1 else (1, *shape[1:])
        drawn = [torch.randn(shapes, generator=g, device=g.device, dtype=torch.float32) for g in each]
        return list(as_array(torch.cat(drawn))[:, None])
    seeds = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    seeds = [secrets.randbelow(2**32) if seed is None else seed for seed in seeds]
    if not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"generator {generator!r}", "a torch.Generator, a seed, or one per video", "pass one of these")
    if count > 1 and len(set(seeds)) == 1:  # one seed: the videos share its stream, as with one torch generator
        return list(standard_normal(batch, seeds[0])[:, None])
    return [standard_normal(shape, seed) for seed in seeds]


def in_form(videos: list[F32], output_type: str, *, tensors: bool) -> Any:
    if output_type == "latent":
        latents = np.concatenate(videos)
        return as_tensor(latents) if tensors else latents
    if output_type == "pil":
        return [[Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in video] for video in videos]
    stacked = np.stack(videos)
    return stacked if output_type == "np" else as_tensor(np.ascontiguousarray(stacked.transpose(0, 1, 4, 2, 3)))
