"""The streaming VAE: one latent frame or four pixel frames per call, with explicit caches (wan22.md §4.5).

The first chunk has a separate graph without cache inputs; every later chunk takes the caches of the previous one. At
most one set of caches exists in addition to the set being written, and none if the engine overwrites the old set: at
720p one set takes 8.7 GB in float32.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.arrays import F32, array_namespace
from runtime.engine import NEXT, Engine
from wan22.progress import Progress, silent

CACHE = "cache_"
CHUNK_FRAMES = 4  # pixel frames per latent frame, except for the first, which is one frame


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
    total = frames.shape[2]
    if total % CHUNK_FRAMES != 1:
        raise ValueError(f"{total} frames; the encoder takes a multiple of {CHUNK_FRAMES} plus 1")
    parts = []
    for latents, done in _stream(first, next, frames, chunk=CHUNK_FRAMES):
        parts.append(latents)
        progress("encode image", done, total, "frames")
    joined: F32 = array_namespace(frames).concatenate(parts, axis=2)
    return joined


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
    (name,) = (tensor.name for tensor in engine.inputs if not tensor.name.startswith(CACHE))
    outputs: Any = engine(**{name: array_namespace(part).ascontiguousarray(part)}, **caches)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    values = {tensor.name: value for tensor, value in zip(engine.outputs, outputs, strict=True)}
    carried = {key.removeprefix(NEXT): values.pop(key) for key in list(values) if key.startswith(NEXT + CACHE)}
    (result,) = values.values()
    return result, carried
