"""The error of FP8 attention probabilities over as many tokens as real videos have, which a small twin does not show.

The exported graph quantises normalised probabilities with the scale 1/448. Over 75,600 tokens of equal weight, each is
1.3e-5, which at that scale is three of E4M3's smallest steps. A kernel that never stores the matrix of probabilities
cannot normalise before it quantises, because it does not know the sum yet: it quantises ``exp(logit - maximum)`` and
divides the result by the sum at the end. This module computes both, with everything else exact. As far as one can see
without a GPU, the compiled kernel is of the second kind: it needs no memory of the size of the matrix.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from export.graphs.linear import FLOAT8_MAX
from runtime.arrays import F32

TOKENS = (1024, 8192, 32760, 75600)  # the last two are 832x480 and 1280x720 at 81 frames
SPREADS = (1.0, 3.0)  # standard deviation of the logits: attention to nearly all tokens, and to a few
HEAD, QUERIES = 128, 32


@dataclass(frozen=True)
class AttentionError:
    """Relative L2 error of a head's output due to quantised probabilities."""

    tokens: int
    spread: float
    as_written: float  # normalised, then quantised
    as_fused: float  # quantised, then normalised


def attention_errors(seed: int, tokens: tuple[int, ...] = TOKENS) -> list[AttentionError]:
    return [_error(np.random.default_rng(seed), count, spread) for count in tokens for spread in SPREADS]


def _error(random: np.random.Generator, tokens: int, spread: float) -> AttentionError:
    q = random.standard_normal((QUERIES, HEAD), np.float32) * np.float32(spread * HEAD**-0.5)
    k, v = (random.standard_normal((tokens, HEAD), np.float32) for _ in "kv")
    logits = q @ k.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    total = weights.sum(1, keepdims=True)
    exact = weights @ v / total
    written = through_fp8(weights / total * np.float32(FLOAT8_MAX)) @ v / np.float32(FLOAT8_MAX)
    fused = through_fp8(weights * np.float32(FLOAT8_MAX)) @ v / (np.float32(FLOAT8_MAX) * total)
    return AttentionError(tokens, spread, _relative(written, exact), _relative(fused, exact))


def through_fp8(x: F32) -> F32:
    """``x`` rounded to E4M3; values beyond its range are clipped."""
    limit = np.float32(FLOAT8_MAX)
    rounded: F32 = np.clip(x, -limit, limit).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return rounded


def _relative(found: F32, exact: F32) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
