"""Write frames as mp4 (H.264), webm (VP9), npz, numbered PNGs or one image; the name determines the format.

Frames are written as they arrive, so a video of any length needs the memory of one chunk (npz collects all frames). A
file with its final name is always complete (:mod:`wan22.files`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime.arrays import F32, array_namespace, require_finite, to_numpy
from wan22.errors import UserError, refusing_disk_errors
from wan22.files import check_room, whole_file, whole_folder
from wan22.quantities import counted

Frames = Iterator[NDArray[np.uint8]]  # each [H, W, 3], RGB
QUALITY = 8  # the official setting; VP9 has about the same fidelity at the same constant rate factor
TAG = "comment"  # metadata key
VP9_SPEED = 4  # out of 8; takes a fifth of the time of 0
BT709 = 1  # its number as colour primaries and as transfer curve (ITU-T H.273)
JPEG_QUALITY = 95
FRAME = "frame_{:05d}.png"
FIRST_FRAME = FRAME.format(0)
IMAGES = (".png", ".jpg", ".jpeg")
FILMS = (".mp4", ".webm")


def to_uint8(frames: F32) -> NDArray[np.uint8]:
    """Convert frames ``[1, 3, f, H, W]`` in [-1, 1] to ``[f, H, W, 3]``: clamp, scale and truncate, not round (§7).

    Raises:
        NonFiniteError: the frames hold NaN or infinity.
    """
    require_finite(frames, "decoded frames")
    levels = (array_namespace(frames).clip(frames[0], -1, 1) + 1) / 2 * 255
    return np.ascontiguousarray(to_numpy(levels.astype(np.uint8)).transpose(1, 2, 3, 0))


def check_destination(path: Path, frames: int, *, overwrite: bool = False) -> None:
    """Refuse a path that cannot hold ``frames`` frames, before any work is done.

    Args:
        path: the output.
        frames: the number of frames.
        overwrite: allow replacing a folder of frames; a file may always be replaced.

    Raises:
        UserError: the extension is unknown, an image cannot hold several frames, or a folder contains anything else.
    """
    ending, shown = path.suffix.lower(), path.name or str(path)
    if ending not in (*FILMS, ".npz", "", *IMAGES):
        expected = "a name ending in .mp4, .webm, .npz, .png or .jpg, or a folder"
        raise UserError(shown, expected, "rename the output")
    if ending in IMAGES and frames > 1:
        raise UserError(f"{counted(frames, 'frame')} for {shown}", "one frame", "use .mp4, a folder or one frame")
    if not ending:
        check_room(path, FIRST_FRAME if overwrite else "")
    with refusing_disk_errors(shown):
        if ending and path.is_dir():
            raise UserError(f"{path} is a folder", "a file to write", "choose another name")


def check_quality(quality: int) -> None:
    """Raise UserError for a quality that is out of range."""
    if not 1 <= quality <= 10:
        raise UserError(f"quality {quality}", "1 to 10", f"choose another; {QUALITY} is the official one")


def encode_video(chunks: Iterable[F32], path: Path, fps: int, quality: int = QUALITY, note: str = "") -> int:
    """Write chunks ``[1, 3, f, H, W]`` in [-1, 1] and return the number of frames.

    Args:
        chunks: consumed one by one; their exceptions propagate.
        path: ``.mp4`` or ``.webm``; ``.npz`` with ``frames``, uint8 ``[F, H, W, 3]``, and ``fps``; ``.png`` or ``.jpg``
            for a single frame; without an extension a folder of ``frame_00000.png`` and so on.
        fps: frames per second, if the format stores it.
        quality: of mp4 and webm, 1 to 10 on imageio's scale; 8 is the official setting.
        note: text for the metadata of mp4, webm and PNG.

    Raises:
        UserError: the format does not support the size or several frames; ``fps`` or ``quality`` is out of range.
        ValueError: ``chunks`` yields no frames.
    """
    if fps < 1:
        raise UserError(f"{fps} frames per second", "at least 1", "the models make 16 or 24")
    check_quality(quality)
    written = 0

    def frames() -> Frames:
        nonlocal written
        for frame in chain.from_iterable(map(to_uint8, chunks)):
            written += 1
            yield frame
        if written == 0:
            raise ValueError("no frames to write")

    ending, images = path.suffix.lower(), frames()
    if ending in FILMS:
        _write_film(images, path, fps, quality, note)
    elif ending == ".npz":
        np.savez(path, frames=np.stack([*images]), fps=fps)
    elif ending:
        _write_image(images, path, note)
    else:
        _write_folder(images, path, note)
    return written


def _write_film(frames: Frames, path: Path, fps: int, quality: int, note: str) -> None:
    """Convert to BT.709 and declare it in the stream: players guess undeclared colours from the size, often wrongly."""
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{width}x{height} for {path.suffix[1:]}", "even sides", "write a folder of PNG frames")
    crf = str(max(1, int(5.1 * (10 - quality))))  # as imageio: int((1 - quality / 10) * 51); 0 means lossless
    if path.suffix.lower() == ".webm":
        encoder, options = "libvpx-vp9", {"crf": crf, "deadline": "good", "cpu-used": str(VP9_SPEED)}
        of_container = {"fflags": "+bitexact"}  # otherwise the file contains a random id
    else:  # x264's macroblock tree is not deterministic, not even with one thread
        encoder, options = "libx264", {"crf": crf, "x264-params": "mbtree=0"}
        of_container = {"movflags": "+faststart"}
    with av.open(str(path), "w", options=of_container) as container:
        if note:
            container.metadata[TAG] = note
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context, bt709, limited = stream.codec_context, Colorspace.ITU709, ColorRange.MPEG
        context.bit_rate = 0  # determined by quality alone
        context.colorspace, context.color_range = bt709, limited
        context.color_primaries = context.color_trc = BT709
        for frame in chain([first], frames):
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", src_colorspace=bt709, dst_colorspace=bt709, dst_color_range=limited)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def _write_folder(frames: Frames, folder: Path, note: str) -> None:
    folder.mkdir(exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / FRAME.format(index), pnginfo=_text(note))


def _write_image(frames: Frames, path: Path, note: str) -> None:
    image = next(frames)
    if next(frames, None) is not None:
        raise UserError(f"several frames for {path.suffix}", "one frame", "use .mp4 or a folder")
    options = {"pnginfo": _text(note)} if path.suffix.lower() == ".png" else {"quality": JPEG_QUALITY}
    Image.fromarray(image).save(path, **options)


def _text(note: str) -> PngInfo:
    info: PngInfo = PngInfo()  # type: ignore[no-untyped-call]
    if note:
        info.add_itxt(TAG, note)
    return info


@contextmanager
def renamed_at_end(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary file or folder that becomes ``path`` if the block succeeds. Raises like ``whole_file``."""
    replaces = FIRST_FRAME if overwrite else ""
    with whole_file(path) if path.suffix else whole_folder(path, replaces) as new:
        yield new
