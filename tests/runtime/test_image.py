import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.image import open_image
from wan22.errors import UserError

W, H = 40, 24


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture():
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 6, y * 10, np.full_like(x, 77)], -1).astype(np.uint8)


def png_claiming(width, height):
    """A PNG whose header states a size and whose pixels are missing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("WEBP", 0), ("JPEG", 12)])
def test_the_three_formats_open_from_bytes_and_from_a_path(tmp_path, kind, tolerance):
    content = encoded(Image.fromarray(picture()), kind, quality=95, lossless=True)
    (tmp_path / "photo").write_bytes(content)
    for source in (content, tmp_path / "photo"):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (W, H))
        assert np.abs(np.asarray(image).astype(int) - picture()).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_upright_whatever_its_exif_orientation(orientation):
    turn_back = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored, exif = Image.fromarray(picture()), Image.Exif()
    for turn in turn_back.get(orientation, []):
        stored = stored.transpose(turn)
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(open_image(encoded(stored, exif=exif))), picture())


def test_broken_exif_is_ignored():
    content = encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\x00" * 8)
    assert open_image(content).size == (W, H)


def test_transparency_lies_over_white():
    alpha = np.full((H, W, 1), 255, np.uint8)
    alpha[:, :20] = 0
    shown = np.asarray(open_image(encoded(Image.fromarray(np.concatenate([picture(), alpha], -1)))))
    assert (shown[:, :20] == 255).all()
    np.testing.assert_array_equal(shown[:, 20:], picture()[:, 20:])


def test_grey_with_alpha_is_flattened():
    image = Image.fromarray(np.full((H, W), 100, np.uint8)).convert("LA")
    image.putalpha(0)
    assert (np.asarray(open_image(encoded(image))) == 255).all()


def test_a_palette_keeps_its_colours_and_its_transparent_entry():
    image = Image.fromarray(np.tile(np.uint8([[0], [1]]), (H // 2, W)), "P")
    image.putpalette([250, 10, 20, 30, 240, 50])
    assert np.unique(np.asarray(open_image(encoded(image))), axis=(0)).shape[0] == 2
    assert np.asarray(open_image(encoded(image)))[:2, 0].tolist() == [[250, 10, 20], [30, 240, 50]]
    assert np.asarray(open_image(encoded(image, transparency=1)))[:2, 0].tolist() == [[250, 10, 20], [255, 255, 255]]


def test_16_bit_grey_keeps_its_upper_byte():
    levels = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    shown = np.asarray(open_image(encoded(Image.fromarray(levels))))
    np.testing.assert_array_equal(shown, np.repeat((levels >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes_become_rgb(mode):
    content = encoded(Image.fromarray(picture()).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert open_image(content).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "unknown or damaged"),
        (b"not an image at all", "unknown or damaged"),
        (encoded(Image.fromarray(picture()), "GIF"), "the image is a GIF"),
        (encoded(Image.fromarray(picture()), "BMP"), "the image is a BMP"),
        (encoded(Image.fromarray(picture()), "TIFF"), "the image is a TIFF"),
        (encoded(Image.fromarray(picture()), "AVIF"), "the image is an AVIF"),
        (b"\0\0\0\x18ftypheic", "the image is a HEIC"),
        (b"\0\0\0\x20ftypisom", "the image is a video"),
        (b'<?xml version="1.0"?><svg/>', "the image is an SVG"),
        (encoded(Image.fromarray(picture()), "PNG")[:-40], "the image: "),
        (encoded(Image.fromarray(picture()).resize((400, 400)), "JPEG")[:-2000], "truncated"),
        (encoded(Image.fromarray(picture()), "WEBP")[:-100], "unknown or damaged"),
        (encoded(Image.fromarray(picture()[:1, :1])), "1x1 pixels"),
        (encoded(Image.fromarray(picture()[:1])), "40x1 pixels"),
        (png_claiming(30000, 30000), "900000000 pixels"),
        (png_claiming(10000, 10000), "100000000 pixels"),
        (png_claiming(100, 100), "the image: "),
    ],
)
def test_what_is_no_usable_image_is_refused(content, found):
    with pytest.raises(UserError) as error:
        open_image(content)
    assert found in error.value.found


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(UserError, match=path.name):
            open_image(path)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(np.asarray(open_image(content)), picture())
