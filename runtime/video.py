"""Frames to a file: film as mp4 (H.264) or webm (VP9), raw as npz or numbered PNGs, or one image; the name says which.

Frames are written as they come, so a film of any length needs the memory of one chunk. What has the final name is
whole (:mod:`wan22.files`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
QUALITY = 8  # the official setting; VP9 is about as near to the frames at the same constant rate factor
TAG = "comment"  # of the metadata
VP9_SPEED = 4  # of 8: a fifth of the time of 0
BT709 = 1  # its number as colour primaries and as transfer curve (ITU-T H.273)
JPEG_QUALITY = 95
FRAME = "frame_{:05d}.png"
FIRST_FRAME = FRAME.format(0)
IMAGES = (".png", ".jpg", ".jpeg")
FILMS = (".mp4", ".webm")


def to_uint8(frames: F32) -> NDArray[np.uint8]:
    """``[f, H, W, 3]`` of frames ``[1, 3, f, H, W]`` in [-1, 1]: clamped, scaled and cut off, not rounded (§7).

    Raises:
        NonFiniteError: the frames hold NaN or infinity.
    """
    require_finite(frames, "decoded frames")
    levels = (array_namespace(frames).clip(frames[0], -1, 1) + 1) / 2 * 255
    return np.ascontiguousarray(to_numpy(levels.astype(np.uint8)).transpose(1, 2, 3, 0))


def check_destination(path: Path, frames: int, *, overwrite: bool = False) -> None:
    """Refuses, before any work is done, a name that ``frames`` frames cannot be written to.

    Args:
        path: where the frames go.
        frames: how many there are.
        overwrite: a folder of frames may be replaced, as a file may anyway.

    Raises:
        UserError: an unknown ending, many frames for one image, a folder with something else in it.
    """
    ending, shown = path.suffix.lower(), path.name or str(path)
    if ending not in (*FILMS, ".npz", "", *IMAGES):
        raise UserError(
            f"{shown}", "a name ending in .mp4, .webm, .npz, .png or .jpg, or a folder", "rename the output"
        )
    if ending in IMAGES and frames > 1:
        raise UserError(f"{counted(frames, 'frame')} for {shown}", "one frame", "use .mp4, a folder, or one frame")
    if not ending:
        check_room(path, FIRST_FRAME if overwrite else "")
    with refusing_disk_errors(shown):
        if ending and path.is_dir():
            raise UserError(f"{path} is a folder", "a file to write", "choose another name")


def write_video(chunks: Iterable[F32], path: Path, fps: int, quality: int = QUALITY, note: str = "") -> int:
    """Writes chunks ``[1, 3, f, H, W]`` in [-1, 1] and returns the count of frames.

    Args:
        chunks: consumed one by one; what they raise passes through and nothing is left behind.
        path: ``.mp4`` or ``.webm``; ``.npz`` with ``frames``, uint8 ``[F, H, W, 3]``, and ``fps``; ``.png`` or ``.jpg``
            for a single frame; no ending: a folder of ``frame_00000.png`` and so on.
        fps: frames per second, where the format has it.
        quality: of mp4 and webm, 1 to 10 as imageio counts it; 8 is the official setting.
        note: text for the metadata of mp4, webm and PNG.

    Raises:
        UserError: as :func:`check_destination` and :func:`encode_video`; another process writes it; a full disk.
        ValueError: no frames.
    """
    check_destination(path, frames=1)
    with renamed_at_end(path) as new:
        return encode_video(chunks, new, fps, quality, note)


def encode_video(chunks: Iterable[F32], path: Path, fps: int, quality: int = QUALITY, note: str = "") -> int:
    """Writes ``path`` itself, under that name from the first frame on; arguments and result as :func:`write_video`.

    Raises:
        UserError: a size that yuv420p cannot hold, no frame rate.
        ValueError: no frames.
    """
    if fps < 1:
        raise UserError(f"{fps} frames per second", "at least 1", "the models make 16 or 24")
    if not 1 <= quality <= 10:
        raise UserError(f"quality {quality}", "1 to 10", f"the official setting is {QUALITY}")
    written = 0

    def frames() -> Frames:
        nonlocal written
        for frame in chain.from_iterable(map(to_uint8, chunks)):
            written += 1
            yield frame
        if written == 0:
            raise ValueError("no frames to write")

    writers: dict[str, Callable[[Frames, Path], None]] = {
        ".mp4": lambda images, name: _write_film(images, name, fps, _format_of(name, quality, note)),
        ".webm": lambda images, name: _write_film(images, name, fps, _format_of(name, quality, note)),
        ".npz": lambda images, name: np.savez(name, frames=np.stack([*images]), fps=fps),
        ".png": lambda images, name: _write_image(images, name, note),
        "": lambda images, name: _write_folder(images, name, note),
    }
    writer = writers.get(path.suffix.lower(), writers[".png"])
    writer(frames(), path)
    return written


@dataclass(frozen=True)
class _Format:
    """How one kind of film is written."""

    encoder: str
    options: dict[str, str]
    container: dict[str, str]
    note: str


def _format_of(path: Path, quality: int, note: str) -> _Format:
    crf = max(1, int(5.1 * (10 - quality)))  # imageio: int((1 - quality / 10) * 51); 0 has a meaning of its own
    if path.suffix.lower() == ".webm":
        options = {"crf": str(crf), "deadline": "good", "cpu-used": str(VP9_SPEED)}
        return _Format("libvpx-vp9", options, {"fflags": "+bitexact"}, note)  # else the file gets a random name inside
    # x264's macroblock tree does not always make the same file of the same frames, not even with one thread
    options = {"crf": str(crf), "x264-params": "mbtree=0"}
    return _Format("libx264", options, {"movflags": "+faststart"}, note)


def _write_film(frames: Frames, path: Path, fps: int, form: _Format) -> None:
    """Converts to BT.709 and says so in the stream: unmarked colours are guessed from the size, and drift."""
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{width}x{height} for {path.suffix[1:]}", "even sides", "write a folder of PNG frames")
    with av.open(str(path), "w", options=form.container) as container:
        if form.note:
            container.metadata[TAG] = form.note
        stream = container.add_stream(form.encoder, rate=fps, options=form.options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.bit_rate = 0  # the quality alone decides
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = BT709
        for frame in chain([first], frames):
            container.mux(stream.encode(_bt709(frame)))
        container.mux(stream.encode(None))


def _bt709(frame: NDArray[np.uint8]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


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
    """Where to write the file or folder that becomes ``path`` if the block ends well. Raises as ``whole_file``."""
    replaces = FIRST_FRAME if overwrite else ""
    with whole_file(path) if path.suffix else whole_folder(path, replaces) as new:
        yield new
