"""Frames to a file: H.264 in mp4, numbered PNGs in a folder, or one image; the name says which.

Frames are written as they come, so a video of any length needs the memory of one chunk. Everything goes under a
temporary name beside the destination and is renamed at the end: a broken run leaves nothing that looks whole.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

from runtime.arrays import F32, array_namespace, require_finite, to_numpy
from wan22.errors import UserError

Frames = Iterator[NDArray[np.uint8]]  # each [H, W, 3], RGB
CRF = 10  # what imageio makes of quality 8, the official setting: int((1 - 8 / 10) * 51)
BT709 = 1  # its number as colour primaries and as transfer curve (ITU-T H.273)
JPEG_QUALITY = 95
IMAGES = (".png", ".jpg", ".jpeg")


def to_uint8(frames: F32) -> NDArray[np.uint8]:
    """``[f, H, W, 3]`` of frames ``[1, 3, f, H, W]`` in [-1, 1]: clamped, scaled and cut off, not rounded (§7).

    Raises:
        NonFiniteError: the frames hold NaN or infinity.
    """
    require_finite(frames, "decoded frames")
    levels = (array_namespace(frames).clip(frames[0], -1, 1) + 1) / 2 * 255
    return np.ascontiguousarray(to_numpy(levels.astype(np.uint8)).transpose(1, 2, 3, 0))


def check_destination(path: Path, frames: int) -> None:
    """Refuses, before any work is done, a name that ``frames`` frames cannot be written to.

    Raises:
        UserError: an unknown ending, many frames for one image, a folder with something in it, an unwritable place.
    """
    ending, shown = path.suffix.lower(), path.name or str(path)
    if ending not in (".mp4", "", *IMAGES):
        raise UserError(f"{shown}", "a name ending in .mp4, .png or .jpg, or a folder", "rename the output")
    if ending in IMAGES and frames > 1:
        raise UserError(f"{frames} frames for {shown}", "one frame", "use .mp4, a folder, or one frame")
    if ending and path.is_dir():
        raise UserError(f"{path} is a folder", "a file to write", "choose another name")
    if not ending and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists", "a new or empty folder", "choose another name")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"cannot write {path}", "a writable folder", "choose another place")


def write_video(chunks: Iterable[F32], path: Path, fps: int) -> int:
    """Writes chunks ``[1, 3, f, H, W]`` in [-1, 1] and returns the count of frames.

    Args:
        chunks: consumed one by one; what they raise passes through and nothing is left behind.
        path: ``.mp4``; ``.png`` or ``.jpg`` for a single frame; no ending: a folder of ``frame_00000.png`` and so on.
        fps: frames per second, of an mp4.

    Raises:
        UserError: as ``check_destination``; a size that H.264 in yuv420p cannot hold; a full disk.
        ValueError: no frames.
    """
    check_destination(path, frames=1)
    if fps < 1:
        raise UserError(f"{fps} frames per second", "at least 1", "the models make 16 or 24")
    written = 0

    def frames() -> Frames:
        nonlocal written
        for frame in chain.from_iterable(map(to_uint8, chunks)):
            written += 1
            yield frame
        if written == 0:
            raise ValueError("no frames to write")

    writers: dict[str, Callable[[Frames, Path], None]] = {
        ".mp4": lambda images, name: _write_mp4(images, name, fps),
        "": _write_folder,
    }
    ending = path.suffix.lower()
    with renamed_at_end(path) as temporary:
        writers.get(ending, _write_image)(frames(), temporary)
    return written


def _write_mp4(frames: Frames, path: Path, fps: int) -> None:
    """Converts to BT.709 and says so in the stream: unmarked colours are guessed from the size, and drift."""
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{width}x{height} for an mp4", "even sides", "write a folder of PNG frames")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF), **_repeatable(width, height)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = BT709
        for frame in chain([first], frames):
            container.mux(stream.encode(_bt709(frame)))
        container.mux(stream.encode(None))


def _repeatable(width: int, height: int) -> dict[str, str]:
    """Below 128 pixels x264's macroblock tree does not always make the same file of the same frames."""
    return {"x264-params": "mbtree=0"} if min(width, height) < 128 else {}


def _bt709(frame: NDArray[np.uint8]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


def _write_folder(frames: Frames, folder: Path) -> None:
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{index:05d}.png")


def _write_image(frames: Frames, path: Path) -> None:
    image = next(frames)
    if next(frames, None) is not None:
        raise UserError(f"several frames for {path.suffix}", "one frame", "use .mp4 or a folder")
    Image.fromarray(image).save(path, quality=JPEG_QUALITY)


@contextmanager
def renamed_at_end(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, with the same ending, that becomes ``path`` if the block ends well."""
    temporary = path.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"disk full while writing {path}", "free space", "free some and run again") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
