"""The inputs of one forward of a transformer: latents, text, the timestep (a sinusoid), token positions (RoPE tables).

Sinusoid and tables are computed here in float64 and passed to the graph as float32: computed in half precision, and the
sinusoid even in float32, they would cost more accuracy than anything else in the model (wan22.md §2.2, §2.3).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import F32, array_namespace
from wan22.errors import UserError
from wan22.parts import DitSpec, rope_split
from wan22.specs import PATCH, POSITIONS, TEXT_TOKENS

THETA = 10000.0


def forward_inputs(
    dit: DitSpec,
    latents: F32,
    timestep: float,
    text: F32,
    condition: F32 | None = None,
    *,
    clean_first_frame: bool = False,
) -> dict[str, F32]:
    """All inputs of a forward by name: step inputs, constant inputs and the text."""
    step = step_inputs(dit, latents, timestep, clean_first_frame=clean_first_frame)
    return step | constant_inputs(dit, latents, condition) | {"text": text}


def step_inputs(dit: DitSpec, latents: F32, timestep: float, *, clean_first_frame: bool = False) -> dict[str, F32]:
    """The inputs that change with every step.

    Args:
        dit: the transformer; models with a clean first frame take two time rows (§2.6).
        latents: ``[1, z, T, h, w]``.
        timestep: on the 0…1000 scale.
        clean_first_frame: latent frame 0 is a noise-free image, at time 0.
    """
    times = [timestep] * dit.time_rows
    if clean_first_frame and dit.time_rows == 2:
        times[0] = 0.0
    features: F32 = array_namespace(latents).asarray(time_features(times, dit.freq_width))
    return {"latents": latents, "time_features": features}


def constant_inputs(dit: DitSpec, latents: F32, condition: F32 | None = None) -> dict[str, F32]:
    """The inputs that stay constant during a run on ``latents``; ``condition`` is ``[1, 20, T, h, w]``."""
    xp, (frames, height, width) = array_namespace(latents), latents.shape[-3:]
    cos, sin = rope_tables(dit.head_width, frames, height // PATCH[1], width // PATCH[2])
    inputs = {"rope_cos": xp.asarray(cos), "rope_sin": xp.asarray(sin)}
    return inputs if condition is None else inputs | {"condition": condition}


def text_rows(embeddings: F32) -> F32:
    """Pad ``[1, tokens, text width]`` with zeros to ``[1, 512, text width]``."""
    rows = np.zeros((1, TEXT_TOKENS, embeddings.shape[2]), np.float32)
    rows[:, : embeddings.shape[1]] = embeddings
    return rows


def time_features(timesteps: Sequence[float] | F32, freq_width: int = 256) -> F32:
    """The sinusoid ``[rows, freq_width]``, cosines first, of timesteps ``[rows]`` on the 0…1000 scale (§2.3)."""
    half = freq_width // 2
    angles = np.outer(np.asarray(timesteps, np.float64), THETA ** (-np.arange(half) / half))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rope_tables(head_width: int, frames: int, rows: int, columns: int) -> tuple[F32, F32]:
    """Cosines and sines ``[frames, rows, columns, head_width / 2]`` of a token grid (§2.2).

    ``frames`` counts latent frames; ``rows`` and ``columns`` count tokens, half the latent rows and columns. A head's
    first pairs rotate with the frame, the next with the row, the last with the column; the frequencies of each axis
    follow from its number of pairs.

    Raises:
        UserError: an axis exceeds the models' 1024 positions.
    """
    for what, length in (("latent frames", frames), ("rows of tokens", rows), ("columns of tokens", columns)):
        if length > POSITIONS:
            raise UserError(f"{length} {what}", f"at most {POSITIONS}", "make the video shorter or smaller")
    grid = (frames, rows, columns)
    angles = [_angles(grid, axis, pairs) for axis, pairs in enumerate(rope_split(head_width))]
    cos, sin = (
        np.concatenate([np.broadcast_to(wave(part).astype(np.float32), (*grid, part.shape[-1])) for part in angles], -1)
        for wave in (np.cos, np.sin)
    )
    return cos, sin


def _angles(grid: tuple[int, int, int], axis: int, pairs: int) -> NDArray[np.float64]:
    """The rotation angle of each pair at each position of one axis, shaped to broadcast over the grid."""
    angles = np.outer(np.arange(grid[axis], dtype=np.float64), THETA ** (-np.arange(pairs) / pairs))
    shape = [1, 1, 1, pairs]
    shape[axis] = grid[axis]
    return angles.reshape(shape)
