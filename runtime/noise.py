"""The noise of ``torch.randn`` with a CPU generator, without torch.

The algorithm (ATen, ``DistributionTemplates.h``) uses a Mersenne twister seeded with ``init_genrand``. For 16 or more
values, Box-Muller turns 24-bit uniforms into normals in blocks of 16, pairing the first eight with the last eight. If
the size is not a multiple of 16, the last 16 values are redrawn. For fewer values, it takes 53-bit uniforms in double
precision, and each pair gives two values. Only the last place differs (5e-7), due to vectorised ``log`` and ``cos``.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import F32
from wan22.errors import UserError

BLOCK = 16
SEED_LIMIT = 2**64


class NormalStream:
    """The noise of consecutive ``torch.randn`` calls with one CPU generator, each of at least 16 values.

    Raises:
        UserError: the seed is outside torch's range (0 to 2**64 - 1; torch uses the low 32 bits).
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < SEED_LIMIT:
            raise UserError(f"seed {seed}", "0 to 2**64 - 1", "choose another seed")
        self._twister = np.random.RandomState(seed % 2**32)

    def draw(self, shape: tuple[int, ...]) -> F32:
        """The next noise, float32 of ``shape``."""
        size = prod(shape)
        values = _blocks(self._twister, size) if size >= BLOCK else _pairs(self._twister, size)
        return values.reshape(shape)


def standard_normal(shape: tuple[int, ...], seed: int) -> F32:
    """Float32 noise of ``shape``, equal to ``torch.randn(shape, generator=torch.Generator("cpu"))`` for ``seed``.

    Raises:
        UserError: the seed is outside torch's range.
    """
    return NormalStream(seed).draw(shape)


def _words(twister: np.random.RandomState, count: int) -> NDArray[np.uint32]:
    """The next raw 32-bit outputs; numpy guarantees that this stream never changes."""
    return twister.randint(0, 2**32, count, dtype=np.uint32)


def _blocks(twister: np.random.RandomState, size: int) -> F32:
    uniforms = _uniform24(twister, size)
    whole = size - size % BLOCK
    _box_muller(uniforms[:whole])
    if whole < size:
        uniforms[-BLOCK:] = _uniform24(twister, BLOCK)
        _box_muller(uniforms[-BLOCK:])
    return uniforms


def _uniform24(twister: np.random.RandomState, count: int) -> F32:
    """[0, 1) in steps of 2**-24, exact in float32."""
    return (_words(twister, count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniforms: F32) -> None:
    """Turn uniforms into normals, in place and in float32 like torch; the size is a multiple of 16."""
    blocks = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    blocks[:, 0] = radius * np.cos(angle)
    blocks[:, 1] = radius * np.sin(angle)


def _pairs(twister: np.random.RandomState, size: int) -> F32:
    """Fewer than 16 values: double precision, first the cosine, then the sine of the same draw."""
    pairs = (size + 1) // 2
    words = _words(twister, 4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
    integers = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    uniforms = integers.astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    angle = 2 * np.pi * uniforms[:, 0]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normals.reshape(-1)[:size].astype(np.float32)
