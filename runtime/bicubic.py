"""``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`` without torch: no antialiasing, a = -0.75.

Positions are rounded to float32 once, like the fused multiply-add in torch's kernels: near a thousand pixels, other
rounding would move a sample by 6e-5 pixels, which causes errors of 1e-4 at sharp edges.
"""

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import F32

A = np.float32(-0.75)


def resize_bicubic(image: F32, height: int, width: int) -> F32:
    """Resize an image ``[C, H, W]`` to ``[C, height, width]``, float32. Values may exceed the range of the input."""
    rows, row_weights = _taps(image.shape[1], height)
    columns, column_weights = _taps(image.shape[2], width)
    tall = np.zeros((image.shape[0], height, image.shape[2]), np.float32)
    for index, weight in zip(rows, row_weights, strict=True):
        tall += image[:, index] * weight[:, None]
    resized = np.zeros((image.shape[0], height, width), np.float32)
    for index, weight in zip(columns, column_weights, strict=True):
        resized += tall[:, :, index] * weight
    return resized


def _taps(size: int, wanted: int) -> tuple[NDArray[np.intp], F32]:
    """The four source indices and weights, ``[4, wanted]`` each, of every sample along one axis."""
    scale = np.float64(np.float32(size) / np.float32(wanted))
    position = (scale * (np.arange(wanted) + 0.5) - 0.5).astype(np.float32)
    before = np.floor(position)
    t = position - before
    weights = np.stack([_far(t + 1), _near(t), _near(1 - t), _far(2 - t)])
    indices = before.astype(np.intp) + np.arange(-1, 3)[:, None]
    return indices.clip(0, size - 1), weights


def _near(x: F32) -> F32:
    """Keys' cubic for distances up to 1."""
    return ((A + 2) * x - (A + 3)) * x * x + 1


def _far(x: F32) -> F32:
    """Keys' cubic for distances from 1 to 2."""
    return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A
