"""Deliver a video, whole or in part, and pictures made of it."""

import io
import re
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from anyio import to_thread
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.api_error import ApiError
from gateway.store import Reader

CHUNK_BYTES = 2**20
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
THUMBNAIL_SIDE, SHEET_SIDE = 640, 240  # longest side of a picture, in pixels
SHEET_COLUMNS, SHEET_MOST = 4, 16
WEBP_QUALITY = 80
PICTURES_KEPT = 32


@dataclass(frozen=True)
class Deliverable:
    size_bytes: int
    etag: str
    media_type: str
    filename: str


def deliver(request: Request, what: Deliverable, reader: Reader) -> Response:
    """The answer for a file, by the request's Range, If-Range and If-None-Match.

    Raises:
        ApiError: 416, nothing of the file is in the range.
    """
    etag = f'"{what.etag}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, no-cache",
        "content-disposition": f'inline; filename="{what.filename}"',
        "x-content-type-options": "nosniff",
    }
    asked = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in asked or "*" in asked:
        reader.close()
        return Response(status_code=304, headers=headers)
    first, end, status = 0, what.size_bytes, 200
    same = request.headers.get("if-range", etag) == etag
    span = _span(request.headers.get("range", ""), what.size_bytes) if same else None
    if span is not None:
        first, end, status = *span, 206
        headers["content-range"] = f"bytes {first}-{end - 1}/{what.size_bytes}"
        if first >= end:
            reader.close()
            unsatisfied = {"content-range": f"bytes */{what.size_bytes}"}
            raise ApiError(416, "range_not_satisfiable", "no such part of the video", headers=unsatisfied)
    headers["content-length"] = str(end - first)
    if request.method == "HEAD":
        reader.close()
        return Response(status_code=status, headers=headers, media_type=what.media_type)
    return StreamingResponse(_chunks(reader, first, end), status, headers, what.media_type)


def _span(text: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a single range; None for what is to be ignored: several ranges, other units, nonsense."""
    match = RANGE.fullmatch(text.replace(" ", ""))
    if not match or match[0] == "bytes=-" or max(map(len, match.groups())) > 18:
        return None
    if not match[1]:  # the last bytes
        return max(0, size - int(match[2])), size
    first, last = int(match[1]), int(match[2] or size - 1)
    if match[2] and last < first:
        return None
    return first, min(last + 1, size)


async def _chunks(reader: Reader, first: int, end: int) -> AsyncIterator[bytes]:
    try:
        while first < end:
            chunk = await to_thread.run_sync(partial(reader.read, first, min(CHUNK_BYTES, end - first)))
            if not chunk:  # cut short from outside: end the connection before the promised length
                raise OSError("the video's file is shorter than recorded")
            first += len(chunk)
            yield chunk
    finally:
        reader.close()


class Pictures:
    """Thumbnails and sprite sheets, the last ones remembered."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def picture(self, job_id: str, variant: str, reader: Reader) -> bytes:
        """A WebP of the video's first frame (``thumbnail``), or of frames in a grid (``spritesheet``)."""
        if (found := self._kept.get((job_id, variant))) is not None:
            return found
        video = reader.read(0, reader.size_bytes)
        made = _thumbnail(video) if variant == "thumbnail" else _spritesheet(video)
        self._kept[job_id, variant] = made
        while len(self._kept) > PICTURES_KEPT:
            self._kept.popitem(last=False)
        return made


def _frames(video: bytes, most: int) -> list[Image.Image]:
    """Up to ``most`` frames, equally far apart."""
    import av

    with av.open(io.BytesIO(video)) as container:
        total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        every = max(1, -(-total // most))
        container.seek(0)
        kept = []
        for number, frame in enumerate(container.decode(video=0)):
            if number % every == 0:
                kept.append(frame.to_image())
            if len(kept) == most:
                break
    return kept


def _thumbnail(video: bytes) -> bytes:
    (frame,) = _frames(video, 1)
    frame.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return _webp(frame)


def _spritesheet(video: bytes) -> bytes:
    frames = _frames(video, SHEET_MOST)
    for frame in frames:
        frame.thumbnail((SHEET_SIDE, SHEET_SIDE))
    width, height = frames[0].size
    columns = min(SHEET_COLUMNS, len(frames))
    sheet = Image.new("RGB", (width * columns, height * -(-len(frames) // columns)))
    for at, frame in enumerate(frames):
        sheet.paste(frame, (at % columns * width, at // columns * height))
    return _webp(sheet)


def _webp(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=WEBP_QUALITY)
    return content.getvalue()
