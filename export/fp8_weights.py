"""The tensors that an FP8 graph stores beside the official ones, computed while the weights stream by.

A matrix is quantised with one scale, its largest magnitude over 448, so that the scale stays in float32 inside the
multiplication. ``qkv`` and ``kv`` join their parts' rows. The scales of Q and K follow from the norm weights alone.

The bias of V moves behind the output projection: probabilities sum to 1, so ``O(P (V + b)) = O(P V) + O b``, and what
is added there in float32 needs not pass through FP8. Where the input of O has a static scale it stays, because that
scale was measured with it.
"""

from collections.abc import Callable, Collection, Mapping

import ml_dtypes
import numpy as np

from export.linear import FLOAT8_MAX
from export.tensor_file import as_torch, extremes
from wan22.specs import DitSpec

Read = Callable[[str], np.ndarray]

JOINED = ("qkv", "kv")
ROWS_AT_ONCE = 256
MARGIN = 1.01  # over the bound of Q and K: the norms compute in float32, their weights may have been rounded


class Fp8Weights:
    """``read`` for :func:`export.weights_file.write_weights`, over ``official``, the reader of a transformer's tensors.

    Args:
        official: gives a tensor by its official name, in any floating type.
        spec: the transformer's dimensions.
        quantised: names of the weights that the graph stores in FP8.
        input_scales: static activation scales of the linears that have one ("blocks.0.ffn.0" → largest input / 448).
    """

    def __init__(
        self, official: Read, spec: DitSpec, quantised: Collection[str], input_scales: Mapping[str, float] | None = None
    ) -> None:
        self._official, self._spec = official, spec
        self._quantised, self._input_scales = frozenset(quantised), input_scales or {}
        self._scales: dict[str, float] = {}
        self._moved = moved_biases(quantised, self._input_scales)

    def __call__(self, key: str) -> np.ndarray:
        stem, leaf = key.rsplit(".", 1)
        if key in self._quantised:
            return self._matrix(key)
        if leaf == "weight_scale":
            return np.array(self._scale_of(f"{stem}.weight"), np.float32)
        if leaf == "input_scale":
            return np.array(self._input_scales[stem], np.float32)
        if leaf in ("q_scale", "k_scale"):
            return self._head_scale(stem, leaf[0])
        return self._bias_of_attention(stem) if key in self._moved else self._official(key)

    def _bias_of_attention(self, linear: str) -> np.ndarray:
        """None is left of V's; O's takes it over, projected in float32."""
        module, name = linear.rsplit(".", 1)
        bias = self._official(f"{linear}.bias").astype(np.float32)
        if name == "v":
            return np.zeros_like(bias)
        weight, moved = (self._official(f"{module}.{key}").astype(np.float32) for key in ("o.weight", "v.bias"))
        return np.asarray(bias + weight @ moved)

    def _matrix(self, key: str) -> np.ndarray:
        """FP8 ``[out, in]``; converted in blocks of rows, so that no second float32 copy of the matrix is made."""
        import torch

        parts = self._parts(key)
        scale = self._scales[key] = _scale_of(parts)
        columns = parts[0].shape[1]
        quantised = torch.empty((sum(len(part) for part in parts), columns), dtype=torch.float8_e4m3fn)
        block, start = torch.empty((ROWS_AT_ONCE, columns)), 0
        for part in parts:
            for row in range(0, len(part), ROWS_AT_ONCE):
                rows = as_torch(part[row : row + ROWS_AT_ONCE])
                values = block[: len(rows)].copy_(rows).div_(scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
                quantised[start : start + len(rows)] = values
                start += len(rows)
        return np.asarray(quantised.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn))

    def _scale_of(self, key: str) -> float:
        if key not in self._scales:
            self._scales[key] = _scale_of(self._parts(key))
        return self._scales[key]

    def _parts(self, key: str) -> list[np.ndarray]:
        module, name, leaf = key.rsplit(".", 2)
        names = name if name in JOINED else [name]
        return [self._official(f"{module}.{part}.{leaf}") for part in names]

    def _head_scale(self, module: str, name: str) -> np.ndarray:
        """No value of RMSNorm over D channels exceeds sqrt(D) times its weight; K may double when centred."""
        largest = float(np.abs(self._official(f"{module}.norm_{name}.weight").astype(np.float32)).max())
        bound = largest * self._spec.width**0.5 * (self._spec.head_width**-0.5 if name == "q" else 2.0)
        return np.array(max(bound, 1e-6) * MARGIN / FLOAT8_MAX, np.float32)


def moved_biases(quantised: Collection[str], input_scales: Collection[str]) -> frozenset[str]:
    """Biases of V and O that are not the checkpoint's, where ``quantised`` are the weights stored in FP8."""
    modules = [key.removesuffix(".o.weight") for key in quantised if key.endswith("_attn.o.weight")]
    return frozenset(
        f"{module}.{part}.bias" for module in modules if f"{module}.o" not in input_scales for part in "vo"
    )


def _scale_of(parts: list[np.ndarray]) -> float:
    largest = max(float(abs(extreme)) for part in parts for extreme in extremes(part))
    return max(largest, 1e-12) / FLOAT8_MAX
