"""What the transformer is told beside latents and text: when it is (the sinusoid) and where tokens are (RoPE tables).

Both are computed here in float64 and handed to the graph as float32, because in half precision, and for the sinusoid
even in float32, they cost more accuracy than anything else in the model (wan22.md §2.2, §2.3).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import F32
from wan22.errors import UserError
from wan22.specs import POSITIONS, rope_split

THETA = 10000.0


def time_features(timesteps: Sequence[float] | F32, freq_width: int = 256) -> F32:
    """``[rows, freq_width]``, cosines before sines, of timesteps ``[rows]`` on the 0…1000 scale (§2.3)."""
    half = freq_width // 2
    angles = np.outer(np.asarray(timesteps, np.float64), THETA ** (-np.arange(half) / half))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rope_tables(head_width: int, frames: int, rows: int, columns: int) -> tuple[F32, F32]:
    """Cosines and sines ``[frames, rows, columns, head_width / 2]`` of a grid of tokens (§2.2).

    ``frames`` counts latent frames; ``rows`` and ``columns`` count tokens, half the latent rows and columns. A head's
    pairs turn with the frame first, then the row, then the column, each axis with frequencies of its own width.

    Raises:
        UserError: an axis longer than the models' 1024 positions.
    """
    for what, length in (("latent frames", frames), ("rows of tokens", rows), ("columns of tokens", columns)):
        if length > POSITIONS:
            raise UserError(f"{length} {what}", f"at most {POSITIONS}", "make the video shorter or smaller")
    grid = (frames, rows, columns)
    angles = [_angles(grid, axis, pairs) for axis, pairs in enumerate(rope_split(head_width))]
    cos, sin = (
        np.concatenate([np.broadcast_to(turn(part).astype(np.float32), (*grid, part.shape[-1])) for part in angles], -1)
        for turn in (np.cos, np.sin)
    )
    return cos, sin


def _angles(grid: tuple[int, int, int], axis: int, pairs: int) -> NDArray[np.float64]:
    """How far every position of one axis turns each of its pairs, shaped to broadcast over the grid."""
    angles = np.outer(np.arange(grid[axis], dtype=np.float64), THETA ** (-np.arange(pairs) / pairs))
    shape = [1, 1, 1, pairs]
    shape[axis] = grid[axis]
    return angles.reshape(shape)
