"""Open an untrusted image: its header is checked before any pixel is decoded.

The result is upright, opaque, 8-bit RGB. Pillow decodes; colour profiles are ignored like in the official code.
"""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wan22.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
OTHERS = (
    (r"GIF8", "a GIF"), (r"BM", "a BMP"), (r"II\*\0|MM\0\*", "a TIFF"), (r".{4}ftypavi[fs]", "an AVIF"),
    (r".{4}ftyp(?:hei|mif1)", "a HEIC"), (r"\xff\n|\0\0\0\fJXL ", "a JPEG XL"), (r"\0\0\0\fjP  ", "a JPEG 2000"),
    (r"%PDF", "a PDF"), (r"\s*<(?:\?xml|svg)", "an SVG"), (r".{4}ftyp|\x1aE\xdf\xa3", "a video"),
)  # fmt: skip
MIN_SIDE = 16
MAX_PIXELS = 89_478_485  # Pillow's limit for suspected decompression bombs; 268 MB of RGB
BACKGROUND = (255, 255, 255, 255)  # behind transparent pixels


def open_image(source: Path | bytes) -> Image.Image:
    """The image, or the first frame of an animation, as upright 8-bit RGB with transparency on white.

    Raises:
        UserError: the file is missing, damaged, not JPEG, PNG or WebP (the message names other known formats), under 16
            pixels wide or high, or over 89 megapixels.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    image = _read_header(source, name)
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        found = f"{name}: {width}x{height} pixels"
        raise UserError(found, f"at least {MIN_SIDE} in each direction", "use a larger image")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height} pixels")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's decoders raise these on broken data
        raise UserError(f"{name}: {error}", "an undamaged image", "download or save it again") from None
    return _opaque(_eight_bit(_upright(image)))


def _read_header(source: Path | bytes, name: str) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}", "a readable image", "give the path of an image file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF data is acceptable
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error).partition(" exceeds")[0]) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError):
        head = content[:64].decode("latin-1")
        if kind := next((kind for pattern, kind in OTHERS if re.match(pattern, head, re.DOTALL)), ""):
            raise UserError(f"{name} is {kind}", "a JPEG, PNG or WebP image", "convert it") from None
        found = f"{name} has an unknown or damaged format"
        raise UserError(found, "a JPEG, PNG or WebP file", "convert or download it again") from None


def _too_large(name: str, found: str) -> UserError:
    return UserError(f"{name}: {found}", f"at most {MAX_PIXELS // 10**6} megapixels", "scale it down")


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; unreadable EXIF data is ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # the type depends on where the data is broken
            return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, because Pillow would clip it; Pillow converts all other modes correctly."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")
