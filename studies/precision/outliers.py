"""Plants outliers in random weights, as large as those measured in the real TI2V-5B (wan22.md §11).

The weight matrices get isolated maxima of the real sizes. The inputs of the four measured linears get a few outlier
channels, fitted until the minimum, median and maximum of their largest values over the twin's blocks are the real ones.
There are no measurements of self-attention. Its K and V, and the K of cross-attention, get channels that are large for
every token, which quantised attention must expect (SageAttention, arXiv 2410.02367). Half of K's outlier channels lie
in pairs that the rotary embedding turns quickly, where subtracting a mean over tokens does not help.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.graphs.dit import dit_graph
from export.graphs.taps import linear_inputs
from runtime.arrays import F32
from studies.precision.session import fill, open_graph
from wan22.parts import DitSpec, rope_split

Kind = Literal["ffn.0", "ffn.2", "cross_attn.q", "cross_attn.o"]


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest abs-max over the blocks of a model."""

    low: float
    median: float
    high: float

    def spread(self, count: int) -> list[float]:
        """``count`` values with this minimum, median and maximum (if ``count`` ≥ 3), the largest in the middle."""
        lower, upper = np.linspace(0, 1, (count + 1) // 2), np.linspace(1, 2, (count + 1) // 2)
        places = np.concatenate([lower, upper[count % 2 :]])
        rising = np.interp(places, [0, 1, 2], [self.low, self.median, self.high])
        return [float(value) for value in (*rising[::2], *rising[1::2][::-1])]


# TI2V-5B, 50 steps at 1280x704x121, including a margin of 10 %: NVIDIA/TensorRT-Model-Connect, families/wan2_2_ti2v
INPUTS: Mapping[Kind, Range] = {
    "ffn.0": Range(4.47, 6.48, 12.03),
    "ffn.2": Range(8.28, 16.12, 62.70),
    "cross_attn.q": Range(27.50, 44.83, 57.75),
    "cross_attn.o": Range(1.07, 1.93, 3.15),
}
WEIGHTS: Mapping[Kind, Range] = {
    "ffn.0": Range(0.225, 0.326, 0.461),
    "ffn.2": Range(0.196, 0.294, 0.792),
    "cross_attn.q": Range(0.125, 0.162, 0.276),
    "cross_attn.o": Range(0.234, 0.999, 1.821),
}

MODULATION = 0.3  # factor of the synthetic shifts and scales; more would exceed the real inputs of ffn.0
OUTLIER_SHARES = (1.0, 0.9, 0.8, 0.7)  # largest value of each outlier channel, as a share of the block's
BULK_SHARE = 0.6  # upper limit of all other channels
OUTLIER_K, OUTLIER_K_BIAS, OUTLIER_V = 8.0, 6.0, 8.0  # factor of the norm's weight, bias, factor of V's rows
SPREAD_TO_MAXIMUM = 5.0  # a matrix's largest element, in standard deviations, at least


# -- planting


def plant(weights: dict[str, F32], spec: DitSpec, random: np.random.Generator) -> None:
    """Damp the modulation and plant isolated maxima and outlier channels of K and V in ``weights``, in place."""
    width = spec.width
    projection = weights["time_projection.1.weight"].reshape(6, width, width)
    projection[[0, 1, 3, 4]] *= MODULATION  # not the gates
    for layer in range(spec.layers):
        block = f"blocks.{layer}"
        for kind, largest in WEIGHTS.items():
            _plant_maxima(weights[f"{block}.{kind}.weight"], largest.spread(spec.layers)[layer], random)
        for attention in ("self_attn", "cross_attn"):
            weights[f"{block}.{attention}.norm_k.weight"][_k_outliers(spec)] *= OUTLIER_K
            weights[f"{block}.{attention}.k.bias"][_k_outliers(spec)] += OUTLIER_K_BIAS
        v_channels = outlier_channels(width)
        weights[f"{block}.self_attn.v.weight"][v_channels] *= OUTLIER_V
        weights[f"{block}.self_attn.v.bias"][v_channels] += OUTLIER_V
        weights[f"{block}.cross_attn.v.bias"][v_channels] += 1.0
        weights[f"{block}.ffn.0.weight"][outlier_channels(spec.ffn_width)] = _signs(random, (4, width)) / width**0.5


def outlier_channels(width: int) -> list[int]:
    """Four channels, one in each quarter."""
    return [width // 4 * quarter + 37 for quarter in range(4)]


def _k_outliers(spec: DitSpec) -> list[int]:
    """One channel per head, alternating between the slowest and the fastest pair of the rotation over frames."""
    slowest = 2 * (rope_split(spec.head_width)[0] - 1)
    return [head * spec.head_width + (slowest if head % 2 == 0 else 0) for head in range(spec.heads)]


def _plant_maxima(matrix: F32, largest: float, random: np.random.Generator) -> None:
    """Plant four isolated elements of up to ``largest``; shrink the rest if it is larger."""
    spread = float(matrix.std())
    if spread * SPREAD_TO_MAXIMUM > largest:
        matrix *= largest / (spread * SPREAD_TO_MAXIMUM)
    np.clip(matrix, -largest, largest, out=matrix)
    places = random.choice(matrix.size, 4, replace=False)
    matrix.reshape(-1)[places] = largest * np.array(OUTLIER_SHARES, np.float32) * _signs(random, 4)


def _signs(random: np.random.Generator, shape: int | tuple[int, ...]) -> F32:
    return random.choice(np.array([-1, 1], np.float32), shape)


# -- fitting


def fit(weights: dict[str, F32], spec: DitSpec, probes: list[dict[str, F32]], rounds: int) -> None:
    """Scale channels in place towards inputs of the measured linears as large as in the real model.

    Every round comes closer.
    """
    for _ in range(rounds):
        found = _channel_maxima(weights, spec, probes)
        for layer in range(spec.layers):
            for kind, real in INPUTS.items():
                largest = found[f"blocks.{layer}.{kind}"]
                factors = _factors(largest, real.spread(spec.layers)[layer])
                _SCALE[kind](weights, f"blocks.{layer}", factors, largest)


def restore_maxima(weights: dict[str, F32], spec: DitSpec) -> None:
    """Restore the planted maxima of the measured matrices, some of which fitting has scaled."""
    for layer in range(spec.layers):
        for kind, real in WEIGHTS.items():
            matrix = weights[f"blocks.{layer}.{kind}.weight"].reshape(-1)
            place = int(np.abs(matrix).argmax())
            matrix[place] = np.copysign(real.spread(spec.layers)[layer], matrix[place])


def _channel_maxima(weights: dict[str, F32], spec: DitSpec, probes: list[dict[str, F32]]) -> dict[str, F32]:
    """The largest magnitude of every input channel ``[in]`` of the measured linears, over tokens and probes."""
    model = fill(dit_graph(spec), weights.__getitem__)
    values = {name: value for name, value in linear_inputs(model).items() if name.split(".", 2)[2] in INPUTS}
    model.graph.outputs.extend(values.values())
    run = open_graph(model)
    runs = [[np.abs(rows).max(0) for rows in run(**probe)[1:]] for probe in probes]
    return dict(zip(values, map(np.maximum.reduce, zip(*runs, strict=True)), strict=True))


def _factors(largest: F32, target: float) -> F32:
    """Factors that bring the outlier channels to their shares of ``target``, the others below ``BULK_SHARE`` of it."""
    channels = outlier_channels(len(largest))
    bulk = float(np.delete(largest, channels).max())
    factors = np.full_like(largest, min(1.0, BULK_SHARE * target / bulk))
    factors[channels] = np.array(OUTLIER_SHARES, np.float32) * target / np.maximum(largest[channels], 1e-3)
    return factors


def _scale_modulation(weights: dict[str, F32], block: str, factors: F32, _largest: F32) -> None:
    shift, scale = weights[f"{block}.modulation"][0, 3:5]
    shift *= factors
    scale[:] = (1 + scale) * factors - 1


def _scale_norm(weights: dict[str, F32], block: str, factors: F32, _largest: F32) -> None:
    for leaf in ("weight", "bias"):
        weights[f"{block}.norm3.{leaf}"] *= factors


def _scale_v(weights: dict[str, F32], block: str, factors: F32, _largest: F32) -> None:
    weights[f"{block}.cross_attn.v.weight"] *= factors[:, None]
    weights[f"{block}.cross_attn.v.bias"] *= factors


def _scale_hidden(weights: dict[str, F32], block: str, factors: F32, largest: F32) -> None:
    """Scale the rows of ffn.0 as far as its largest weight allows; the bias adds what outlier rows still lack."""
    matrix, bias = weights[f"{block}.ffn.0.weight"], weights[f"{block}.ffn.0.bias"]
    limit, rows = float(np.abs(matrix).max()), outlier_channels(len(bias))
    target = factors[rows] * largest[rows]
    factors[rows] = np.minimum(factors[rows], limit / np.abs(matrix[rows]).max(1))
    matrix *= factors[:, None]
    bias *= factors
    bias[rows] += target - factors[rows] * largest[rows]


_SCALE: Mapping[Kind, Callable[[dict[str, F32], str, F32, F32], None]] = {
    "ffn.0": _scale_modulation,
    "ffn.2": _scale_hidden,
    "cross_attn.q": _scale_norm,
    "cross_attn.o": _scale_v,
}
