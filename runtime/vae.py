"""The streaming VAE: one latent frame or four pixel frames per call, with explicit caches (wan22.md §4.5).

Whole: the first chunk has a separate graph without cache inputs; every later chunk takes the caches of the previous
one. At most one set of caches exists in addition to the set being written, and none if the engine overwrites the old
set: at 720p one set takes 8.7 GB in float32.

In stages (:mod:`wan22.strips`): every stage but "motion" runs frame by frame. Its convolutions remember two frames as
two arrays, of which a call replaces the older, so a call writes half a set, and no stage writes while another holds
what it wrote before. With several strips, one strip is decoded to the end before the next, so that the caches of one
exist; the middle, which sees the whole picture, runs before all of them, or behind them in the encoder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.arrays import F32, array_namespace, to_numpy
from runtime.engine import NEXT, Engine
from wan22.parts import VaeSpec
from wan22.progress import Progress, silent
from wan22.shapes import shape_of, sizes_of
from wan22.strips import Strip, check_strips, cut_axis, strips_of

CACHE, RECENT = "cache_", "recent_"
CHUNK_FRAMES = 4  # pixel frames per latent frame, except for the first, which is one frame
ROWS = 3  # axis of a video's rows; columns follow


def decode(first: Engine, next: Engine | None, latents: F32) -> Iterator[F32]:
    """Yield frames ``[1, 3, 1, H, W]``, then ``[1, 3, 4, H, W]`` for each further latent frame, in [-1, 1].

    Args:
        first: ``vae_decoder_first``.
        next: ``vae_decoder_next``; not needed for one latent frame.
        latents: ``[1, z, T, h, w]`` as the sampler returns them.
    """
    for frames, _ in _stream(first, next, latents, chunk=1):
        yield frames


def encode(first: Engine, next: Engine | None, frames: F32, progress: Progress = silent) -> F32:
    """Normalised latents ``[1, z, T, h, w]`` of frames ``[1, 3, 4 (T - 1) + 1, H, W]`` in about [-1, 1].

    Args:
        first: ``vae_encoder_first``.
        next: ``vae_encoder_next``; not needed for one frame.
        frames: the video; chunks are copied from it one by one.
        progress: receives the number of encoded frames.

    Raises:
        ValueError: the number of frames is not a multiple of 4 plus 1.
    """
    total = _whole_groups(frames)
    parts = []
    for latents, done in _stream(first, next, frames, chunk=CHUNK_FRAMES):
        parts.append(latents)
        progress("encode image", done, total, "frames")
    joined: F32 = array_namespace(frames).concatenate(parts, axis=2)
    return joined


def _whole_groups(frames: F32) -> int:
    total = int(frames.shape[2])
    if total % CHUNK_FRAMES != 1:
        raise ValueError(f"{total} frames; the encoder takes a multiple of {CHUNK_FRAMES} plus 1")
    return total


@dataclass(frozen=True)
class Stages:
    """The engines of a half in stages: :func:`export.graphs.vae_decoder.decoder_stage` has what they take."""

    spec: VaeSpec
    middle: Engine
    motion_first: Engine
    motion_next: Engine | None  # not needed for one latent frame
    coarse: Engine
    fine: Engine


Spread = Callable[[Sequence[Callable[[], None]]], None]  # does all of it, on one device or several


def in_turns(work: Sequence[Callable[[], None]]) -> None:
    for each in work:
        each()


def decode_in_strips(stages: Stages, latents: F32, count: int, spread: Spread = in_turns) -> Iterator[F32]:
    """:func:`decode` with the decoder in stages and pictures in ``count`` strips; equal but for rounding.

    One strip yields every chunk when it is decoded. Several yield when the last of them is, and hold the video until
    then: 12 bytes for a pixel of a frame. ``spread`` decodes them.

    Raises:
        UserError: more strips than the latent grid has rows or columns.
    """
    size = (int(latents.shape[ROWS]), int(latents.shape[ROWS + 1]))
    check_strips(count, size)
    total, middle = int(latents.shape[2]), _FrameByFrame(stages.middle)
    if count == 1:
        strip = _StripDecoder(stages)
        for index in range(total):
            yield strip(middle(latents[:, :, index : index + 1]))
        return
    features = np.concatenate([to_numpy(middle(latents[:, :, at : at + 1])) for at in range(total)], axis=2)
    del middle
    stride, ends = stages.spec.spatial_stride, [0, *range(1, CHUNK_FRAMES * total, CHUNK_FRAMES)]
    video = np.empty((1, 3, ends[-1], *(side * stride for side in size)), np.float32)

    def decode_strip(place: Strip) -> None:
        strip = _StripDecoder(stages)
        for index, (start, stop) in enumerate(pairwise(ends)):
            frames = strip(_cut(features[:, :, index : index + 1], size, place.low, place.high))
            kept = _cut(frames, size, stride * place.kept.start, stride * place.kept.stop)
            _cut(video[:, :, start:stop], size, stride * place.start, stride * place.stop)[...] = kept

    strips = strips_of(stages.spec, "vae_decoder", size[cut_axis(size)], count)
    spread([partial(decode_strip, place) for place in strips])
    for start, stop in pairwise(ends):
        yield video[:, :, start:stop]


def encode_in_strips(
    stages: Stages, frames: F32, count: int, progress: Progress = silent, spread: Spread = in_turns
) -> F32:
    """:func:`encode` with the encoder in stages and pictures in ``count`` strips; equal but for rounding.

    ``spread`` encodes them.

    Raises:
        ValueError: the number of frames is not a multiple of 4 plus 1.
        UserError: more strips than the latent grid has rows or columns.
    """
    total, stride = _whole_groups(frames), stages.spec.spatial_stride
    size = (frames.shape[ROWS] // stride, frames.shape[ROWS + 1] // stride)
    check_strips(count, size)
    ends = [0, *range(1, total + 1, CHUNK_FRAMES)]
    parts: list[dict[Strip, F32]] = [{} for _ in ends[1:]]  # of every latent frame
    strips = strips_of(stages.spec, "vae_encoder", size[cut_axis(size)], count)
    done = dict.fromkeys(strips, 0)

    def encode_strip(place: Strip) -> None:
        strip = _StripEncoder(stages)
        for part, (start, stop) in zip(parts, pairwise(ends), strict=True):
            features = to_numpy(strip(_cut(frames[:, :, start:stop], size, stride * place.low, stride * place.high)))
            part[place] = _cut(features, size, place.kept.start, place.kept.stop)
            done[place] = stop
            progress("encode image", sum(done.values()), count * total, "frames")

    spread([partial(encode_strip, place) for place in strips])
    middle, axis = _FrameByFrame(stages.middle), ROWS + cut_axis(size)
    joined = (np.concatenate([part[place] for place in strips], axis=axis) for part in parts)
    return np.concatenate([to_numpy(middle(features)) for features in joined], axis=2)


def _cut(video: F32, size: tuple[int, int], low: int, high: int) -> F32:
    """Rows or columns ``low`` to ``high`` of ``video``, along the side that strips of a grid of ``size`` divide."""
    return video[..., low:high, :] if cut_axis(size) == 0 else video[..., low:high]


class _FrameByFrame:
    """A stage that takes one frame per call, and the two frames that each of its convolutions remembers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._caches: dict[str, F32] = {}

    def __call__(self, frame: F32) -> F32:
        if not self._caches:
            self._caches = self._zeros(frame)
        result, written = _run(self._engine, frame, self._caches)
        caches = self._caches
        self._caches = {name: caches[name.replace(CACHE, RECENT)] for name in written}
        self._caches |= {name.replace(CACHE, RECENT): array for name, array in written.items()}
        return result

    def _zeros(self, frame: F32) -> dict[str, F32]:
        """Caches before the first frame, where the frame is: what is zero there is the padding of the convolutions."""
        given = [tensor for tensor in self._engine.inputs if not _is_state(tensor.name)]
        sizes, zeros = sizes_of(given, {given[0].name: frame.shape}), array_namespace(frame).zeros
        return {t.name: zeros(shape_of(t, sizes), t.dtype) for t in self._engine.inputs if _is_state(t.name)}


class _Motion:
    """The stage that doubles or halves frames, with its caches."""

    def __init__(self, stages: Stages) -> None:
        self._first, self._next = stages.motion_first, stages.motion_next
        self._caches: dict[str, F32] | None = None

    def __call__(self, part: F32) -> F32:
        first = self._caches is None
        if not first and self._next is None:
            raise ValueError("further frames need the graph for later chunks")
        engine = self._first if first or self._next is None else self._next
        result, self._caches = _run(engine, part, self._caches or {})
        return result


class _StripDecoder:
    """Features ``[1, C, 1, h, w]`` of one strip after the other → frames ``[1, 3, 1, H, W]``, then ``[1, 3, 4, …]``."""

    def __init__(self, stages: Stages) -> None:
        self._motion = _Motion(stages)
        self._coarse, self._fine = _FrameByFrame(stages.coarse), _FrameByFrame(stages.fine)

    def __call__(self, features: F32) -> F32:
        pictures = self._motion(features)
        frames = [to_numpy(self._fine(self._coarse(picture))) for picture in _each(pictures)]
        return np.concatenate(frames, axis=2)


class _StripEncoder:
    """Frames ``[1, 3, 1, H, W]``, then ``[1, 3, 4, H, W]`` of one strip → features ``[1, C, 1, h, w]``."""

    def __init__(self, stages: Stages) -> None:
        self._motion = _Motion(stages)
        self._coarse, self._fine = _FrameByFrame(stages.coarse), _FrameByFrame(stages.fine)

    def __call__(self, frames: F32) -> F32:
        pictures: Sequence[F32] = [self._coarse(self._fine(frame)) for frame in _each(frames)]
        return self._motion(array_namespace(pictures[0]).concatenate(pictures, axis=2))


def _each(video: F32) -> Iterator[F32]:
    """The frames of ``video``."""
    return (video[:, :, index : index + 1] for index in range(video.shape[2]))


def _stream(first: Engine, next: Engine | None, video: F32, *, chunk: int) -> Iterator[tuple[F32, int]]:
    """Yield the result for frame 0 and for every next ``chunk`` frames, with the number of frames done."""
    result, caches = _run(first, video[:, :, :1], {})
    yield result, 1
    for start in range(1, video.shape[2], chunk):
        if next is None:
            raise ValueError(f"{video.shape[2]} frames need the graph for later chunks")
        result, caches = _run(next, video[:, :, start : start + chunk], caches)
        yield result, start + chunk


def _run(engine: Engine, part: F32, caches: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
    """Call ``engine``; return its result, and its caches under the input names of the next call."""
    (name,) = (tensor.name for tensor in engine.inputs if not _is_state(tensor.name))
    outputs: Any = engine(**{name: array_namespace(part).ascontiguousarray(part)}, **caches)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    values = {tensor.name: value for tensor, value in zip(engine.outputs, outputs, strict=True)}
    carried = {key.removeprefix(NEXT): values.pop(key) for key in list(values) if key.startswith(NEXT + CACHE)}
    (result,) = values.values()
    return result, carried


def _is_state(name: str) -> bool:
    return name.startswith((CACHE, RECENT))
