"""The default image of a validation: always the same, and designed to reveal errors.

Errors of a resize show at hard edges, those of an encoder also in smooth areas. So the image has a sky and hills in
gradients, a disc, and a sign with letters whose strokes are one, two and three pixels wide. It is drawn with numpy
only, because fonts and antialiased lines differ between versions of a library.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Colours = NDArray[np.float64]  # [H, W, 3] or [3], 0…1
Mask = NDArray[np.bool_]  # [H, W]

SKY, GLOW, SUN = (0.18, 0.36, 0.70), (0.99, 0.78, 0.58), (1.0, 0.95, 0.78)
HILLS, MEADOW, SHADE = (0.40, 0.45, 0.56), (0.24, 0.46, 0.26), (0.07, 0.16, 0.11)
PAPER, INK = (0.97, 0.96, 0.91), (0.10, 0.09, 0.13)
LETTERS = {"W": (17, 17, 17, 21, 21, 27, 17), "A": (14, 17, 17, 31, 17, 17, 17), "N": (17, 25, 25, 21, 19, 19, 17)}
STROKES = (1, 2, 3)  # pixels


def picture_for(size: tuple[int, int]) -> bytes:
    """The sample image as a PNG, 1.5 times ``size`` (width, height), so that it must be scaled."""
    width, height = size
    return built_in_picture(3 * width // 2, 3 * height // 2)


def built_in_picture(width: int, height: int) -> bytes:
    """The sample image as a PNG of ``width`` x ``height`` pixels."""
    pixels = (_landscape(width, height) * 255).round().astype(np.uint8)
    _write_sign(pixels)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _landscape(width: int, height: int) -> Colours:
    y, x = np.mgrid[:height, :width] / np.array([[[height]], [[width]]])
    colours = _blend(SKY, GLOW, y / 0.62)
    reach = np.hypot((x - 0.3) * width, (y - 0.3) * height) / min(width, height)
    colours[reach < 0.13] = SUN
    far = y > 0.56 + 0.05 * np.sin(9 * x) + 0.02 * np.sin(23 * x + 1)
    colours[far] = _blend(HILLS, GLOW, 1.5 * (y - 0.5))[far]
    near = y > 0.74 - 0.09 * np.sin(4 * x + 0.6)
    colours[near] = _blend(MEADOW, SHADE, 3 * (y - 0.66))[near]
    return colours


def _blend(one: tuple[float, ...], other: tuple[float, ...], share: NDArray[np.float64]) -> Colours:
    weight = share.clip(0, 1)[..., None]
    blended: Colours = (1 - weight) * np.array(one) + weight * np.array(other)
    return blended


def _write_sign(pixels: NDArray[np.uint8]) -> None:
    """Draw the sign into the right half, in place, cropped if it does not fit."""
    height, width = pixels.shape[:2]
    top, left = height // 5, width // 2 + width // 16
    word = _word()
    room = pixels[top : top + word.shape[0], left : left + word.shape[1]]
    ink = word[: room.shape[0], : room.shape[1], None]
    room[:] = np.where(ink, np.array(INK) * 255, np.array(PAPER) * 255).round()


def _word() -> Mask:
    """The word once per stroke width, stacked, with a margin; True is ink."""
    lines = [np.kron(_line("WAN"), np.ones((stroke, stroke), bool)) for stroke in STROKES]
    sheet = np.zeros((sum(line.shape[0] + 4 for line in lines) + 4, max(line.shape[1] for line in lines) + 8), bool)
    top = 4
    for line in lines:
        sheet[top : top + line.shape[0], 4 : 4 + line.shape[1]] = line
        top += line.shape[0] + 4
    return sheet


def _line(text: str) -> Mask:
    """``text`` in letters 7 pixels high and 5 wide, one pixel apart."""
    bits = [[[row >> bit & 1 for bit in range(5, -1, -1)] for row in LETTERS[letter]] for letter in text]
    return np.concatenate(np.array(bits, bool), axis=1)
