"""An image from outside, opened without trusting it: its header is judged before any pixel is decoded.

What comes out is what the photographer saw: upright, opaque, 8-bit RGB. Pillow decodes; colour profiles are ignored, as
in the official code.
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
MAX_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb; 268 MB of RGB
BACKGROUND = (255, 255, 255, 255)  # behind transparent pixels


def open_image(source: Path | bytes) -> Image.Image:
    """The image as upright RGB; transparency over white, the first frame of an animation, 16 bits cut to 8.

    Raises:
        UserError: no such file, no JPEG, PNG or WebP (other kinds are named), sides under 16 pixels, over 89
            megapixels, broken data.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    image = _opened(source, name)
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{name}: {width}x{height} pixels", f"at least {MIN_SIDE} each way", "use a larger image")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height} pixels")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken data
        raise UserError(f"{name}: {error}", "a whole image", "fetch or save it again") from None
    return _opaque(_eight_bit(_upright(image)))


def _opened(source: Path | bytes, name: str) -> Image.Image:
    """The image with its header read and nothing decoded."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}", "a readable image", "name an image file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF, which is no reason to refuse
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error).partition(" exceeds")[0]) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError):
        if kind := _kind(content):
            raise UserError(f"{name} is {kind}", "a JPEG, PNG or WebP image", "convert it") from None
        raise UserError(f"{name} is no image", "a whole JPEG, PNG or WebP file", "convert or fetch it again") from None


def _kind(content: bytes) -> str:
    """What its first bytes say it is, "a GIF"; "" for what is unknown. Nothing is decoded."""
    head = content[:64].decode("latin-1")
    return next((kind for pattern, kind in OTHERS if re.match(pattern, head, re.DOTALL)), "")


def _too_large(name: str, found: str) -> UserError:
    return UserError(f"{name}: {found}", f"at most {MAX_PIXELS // 10**6} megapixels", "scale it down")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF data that cannot be read says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # a dozen kinds, depending on where the data is broken
            return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow would clip it. Everything else Pillow converts itself."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")
