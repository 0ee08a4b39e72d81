"""Values of a synthetic checkpoint's tensors: random, but scaled so that every part of the model does real work.

Matrices are scaled by their fan-in, and ``_GAINS`` sets the standard deviation of the output for a unit-variance input.
N(0, 1) latents give velocities of order 1, gates of order ½ and text embeddings of order ⅓. Frames fill [-1, 1] with
little clipping, and encoded latents have the real VAE's range. Every tensor has its own generator, seeded with
(seed, part, name): order, layout and sharding never change a value, and the two experts differ.
"""

import hashlib
from collections.abc import Iterator
from math import prod
from statistics import mean

import numpy as np
import numpy.typing as npt

from wan22.specs import ModelSpec

PIECE_ELEMENTS = 2**22

# Standard deviation of the output for a unit-variance input, if not 1. Keys are suffixes of names.
_GAINS = {
    "dit": {
        "text_embedding.0.weight": 3.0,  # embeddings are of order 1/3
        "time_embedding.2.weight": 2.0,
        "time_projection.1.weight": 1.2,
        "head.head.weight": 0.65,
    },
    "text_encoder": {},
    "vae": {"residual.6.weight": 0.8, "decoder.head.2.weight": 0.7},
}
_MODULATION_STD = 0.3
_BIAS_STD = 0.05
_NORM_STD = 0.1  # around 1
_TEXT_NORM = (0.3, 0.05)  # mean and spread of umt5's final norm: the scale of the embeddings


def pieces(
    spec: ModelSpec, seed: int, part: str, name: str, shape: tuple[int, ...]
) -> Iterator[npt.NDArray[np.float32]]:
    """The elements of a tensor in order, at most ``PIECE_ELEMENTS`` at a time.

    ``part`` is an expert of ``spec``, "text_encoder" or "vae"; ``name`` is official.
    """
    digest = hashlib.sha256(f"{seed}/{part}/{name}".encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    center, spread = moments(spec, part, name, shape)
    left = prod(shape)
    while left:
        piece = random.standard_normal(min(left, PIECE_ELEMENTS), dtype=np.float32)
        piece *= np.float32(spread)
        piece += np.float32(center)
        left -= piece.size
        yield piece


def moments(spec: ModelSpec, part: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements."""
    kind = "dit" if part in spec.experts else part
    if name.endswith("modulation"):
        return 0.0, _MODULATION_STD
    if name.endswith(".bias"):
        return 0.0, _BIAS_STD
    if "norm" in name or name.endswith(".gamma"):
        return _TEXT_NORM if name == "norm.weight" else (1.0, _NORM_STD)
    if kind == "text_encoder":
        return 0.0, _text_encoder_std(spec, name, shape)
    gain = next((gain for end, gain in _GAINS[kind].items() if name.endswith(end)), 1.0)
    if (part, name) == ("vae", "conv1.weight"):
        gain = 1.6 * mean(spec.vae.latents_std)  # gives normalised latents unit variance
    return 0.0, gain / prod(shape[1:]) ** 0.5


def _text_encoder_std(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> float:
    """T5's initialisation: its attention has no 1/√d, so the queries carry that factor."""
    if name.startswith("token_embedding") or "pos_embedding" in name:
        return 1.0
    fan_in = shape[1] * (spec.text_encoder.head_width if name.endswith("attn.q.weight") else 1)
    return float(fan_in**-0.5)
