"""The tensors that an FP8 graph stores beside the official ones, computed while the weights stream by.

A matrix is quantised with one scale, its largest magnitude over 448, so that the scale stays in float32 inside the
multiplication. ``qkv`` and ``kv`` join their parts' rows. The scales of Q and K follow from the norm weights alone.

The bias of V moves behind the output projection: probabilities sum to 1, so ``O(P (V + b)) = O(P V) + O b``, and what
is added there in float32 needs not pass through FP8. Where the input of O has a static scale it stays, because that
scale was measured with it. A mean that the graph subtracts from the input of a linear comes back through its bias.
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
        input_means: what enters the linears whose inputs the graph centres, on average, [in] each.
    """

    def __init__(
        self,
        official: Read,
        spec: DitSpec,
        quantised: Collection[str],
        input_scales: Mapping[str, float] | None = None,
        input_means: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._official, self._spec = official, spec
        self._quantised, self._input_scales, self._means = frozenset(quantised), input_scales or {}, input_means or {}
        self._scales: dict[str, float] = {}
        self._moved = moved_biases(quantised, self._input_scales)
        self._remade = remade_biases(quantised, self._input_scales, self._means)

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
        if leaf == "input_mean":
            return self._mean(stem)
        return self._bias(stem) if key in self._remade else self._official(key)

    def _bias(self, linear: str) -> np.ndarray:
        """With what the mean of the input brings; none is left of V's, O's takes it over, projected in float32."""
        module, name = linear.rsplit(".", 1)
        if f"{linear}.bias" not in self._moved:
            return self._own_bias(linear)
        bias = self._own_bias(linear)
        return np.zeros_like(bias) if name == "v" else bias + self._weight(linear) @ self._own_bias(f"{module}.v")

    def _own_bias(self, linear: str) -> np.ndarray:
        bias = self._official(f"{linear}.bias").astype(np.float32)
        entering = _entry(linear)
        return np.asarray(bias + self._weight(linear) @ self._mean(entering) if entering in self._means else bias)

    def _mean(self, linear: str) -> np.ndarray:
        """Of what enters in this graph: without V's bias where that comes after O."""
        mean = self._means[linear].astype(np.float32)
        moved = linear.endswith(".o") and f"{linear}.bias" in self._moved
        return np.asarray(mean - self._own_bias(f"{linear[:-1]}v") if moved else mean)

    def _weight(self, linear: str) -> np.ndarray:
        return np.asarray(self._official(f"{linear}.weight").astype(np.float32))

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


def remade_biases(
    quantised: Collection[str], input_scales: Collection[str], input_means: Collection[str]
) -> frozenset[str]:
    """All biases that are not the checkpoint's."""
    stems = [key.removesuffix(".weight").rsplit(".", 1) for key in quantised]
    linears = [f"{module}.{part}" for module, name in stems for part in (name if name in JOINED else [name])]
    centred = frozenset(f"{linear}.bias" for linear in linears if _entry(linear) in input_means)
    return centred | moved_biases(quantised, input_scales)


def _entry(linear: str) -> str:
    """The linear whose name stands for what enters: q for q, k and v of self-attention."""
    module, name = linear.rsplit(".", 1)
    return f"{module}.q" if module.endswith("self_attn") and name in "qkv" else linear


def _scale_of(parts: list[np.ndarray]) -> float:
    largest = max(float(abs(extreme)) for part in parts for extreme in extremes(part))
    return max(largest, 1e-12) / FLOAT8_MAX
