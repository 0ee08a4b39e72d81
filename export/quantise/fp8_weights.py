"""The tensors that an FP8 graph stores in addition to the official ones, computed while the weights are streamed.

A matrix is quantised with one scale, its largest magnitude over 448, which stays in float32 inside the multiplication.
``qkv`` and ``kv`` concatenate the rows of their parts. The scales of Q and K depend on the norm weights only.

A matrix that the checkpoint stores in FP8 keeps its codes. If its rows have different scales, the multiplication uses
the smallest, so that 16-bit products do not overflow, and ``column_scale`` holds each row's multiple of it.

The bias of V moves behind the output projection: probabilities sum to 1, so ``O(P (V + b)) = O(P V) + O b``, and the
float32 addition there avoids FP8. If the input of O has a static scale, the bias stays in V, because the scale was
measured with it. The bias of a linear restores the mean that the graph subtracts from its input.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from export.files.decoded import Codes
from export.files.tensor_file import Array, as_torch, check_finite, extremes
from export.graphs.linear import FLOAT8_MAX
from wan22.parts import DitSpec

Read = Callable[[str], np.ndarray]

JOINED = ("qkv", "kv")
NAN_CODES = (0x7F, 0xFF)
PIECE_ELEMENTS, BLOCK_ELEMENTS = 2**22, 2**16
MARGIN = 1.01  # over the bound of Q and K: the norms compute in float32, but their weights may have been rounded


class Fp8Weights:
    """The tensors of an FP8 transformer, made from the official ones.

    :meth:`pieces` serves :func:`export.graphs.weights_file.write_weights`.

    Args:
        official: reads a tensor by its official name, in any floating type.
        spec: the transformer's dimensions.
        quantised: names of the weights that the graph stores in FP8.
        input_scales: static activation scales by linear ("blocks.0.ffn.0" → largest input / 448).
        input_means: mean inputs [in] of the linears whose inputs the graph centres.
        codes: returns a matrix that is already stored in FP8, which is not rounded again; None for any other.
        by_column: the weights in FP8 that have a ``column_scale``.
    """

    def __init__(
        self,
        official: Read,
        spec: DitSpec,
        quantised: Collection[str],
        input_scales: Mapping[str, float] | None = None,
        input_means: Mapping[str, np.ndarray] | None = None,
        codes: Callable[[str], Codes | None] = lambda _name: None,
        by_column: Collection[str] = (),
    ) -> None:
        self._official, self._spec = official, spec
        self._quantised, self._input_scales, self._means = frozenset(quantised), input_scales or {}, input_means or {}
        self._codes, self._by_column = codes, frozenset(by_column)
        self._scales: dict[str, float] = {}
        self._held: dict[str, np.ndarray] = {}  # official matrices currently in memory
        self._biases: dict[str, np.ndarray] = {}  # biases computed from them, not yet written
        self._moved = moved_biases(quantised, self._input_scales)
        self._remade = remade_biases(quantised, self._input_scales, self._means)

    def pieces(self, key: str) -> Iterable[np.ndarray]:
        """The elements of a tensor in order.

        Matrices are read immediately and quantised lazily, so that one thread can read while another computes.
        """
        if kept := self._stored_codes(key):
            return (piece for codes in kept for piece in _without_nan(key, codes.stored.pieces()))
        parts = self._parts(key) if key in self._quantised else {}
        return self._compute(key, parts)

    def _stored_codes(self, key: str) -> list[Codes]:
        """The stored codes of a matrix's parts if all of them have codes whose scales the graph can hold, else none."""
        found = [self._codes(name) for name in self._names(key)] if key in self._quantised else []
        kept = [codes for codes in found if codes is not None]
        if len(kept) < len(found):
            return []
        return kept if key in self._by_column or not scales_differ(kept) else []

    def _row_scales(self, key: str) -> np.ndarray:
        """The scale of every row of the matrix ``key``: float32 [out]."""
        if kept := self._stored_codes(key):
            return np.concatenate([np.broadcast_to(codes.scale, codes.stored.shape[0]) for codes in kept])
        rows = sum(len(part) for part in self._parts(key).values())
        return np.full(rows, self._scale_of(key), np.float32)

    def _compute(self, key: str, parts: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
        if not parts:
            yield self(key)
            return
        scale = self._measure(key, parts)
        for part in parts.values():
            yield from _quantise(part, scale)

    def __call__(self, key: str) -> np.ndarray:
        stem, leaf = key.rsplit(".", 1)
        if key in self._quantised:
            return self._whole(key)
        if leaf.endswith("_scale"):
            return self._scale(stem, leaf)
        if leaf == "input_mean":
            return self._mean(stem)
        if key in self._remade:
            return self._biases.pop(key) if key in self._biases else self._bias(stem)
        return self._official(key)

    def _scale(self, stem: str, leaf: str) -> np.ndarray:
        if leaf in ("q_scale", "k_scale"):
            return self._head_scale(stem, leaf[0])
        if leaf == "column_scale":
            rows = self._row_scales(f"{stem}.weight")
            return np.asarray(rows / rows.min())
        scale = self._input_scales[stem] if leaf == "input_scale" else self._scale_of(f"{stem}.weight")
        return np.array(scale, np.float32)

    def _whole(self, key: str) -> np.ndarray:
        """The FP8 matrix ``[out, in]``."""
        if kept := self._stored_codes(key):
            return np.concatenate([piece for codes in kept for piece in _without_nan(key, [codes.stored.read()])])
        parts = self._parts(key)
        pieces = list(self._compute(key, parts))
        return np.concatenate(pieces).reshape(-1, next(iter(parts.values())).shape[1])

    def _bias(self, linear: str) -> np.ndarray:
        """The bias including the term of the input's mean; V's bias becomes zero and moves, projected, into O's."""
        module, name = linear.rsplit(".", 1)
        if f"{linear}.bias" not in self._moved:
            return self._own_bias(linear)
        bias = self._own_bias(linear)
        return np.zeros_like(bias) if name == "v" else bias + self._weight(linear) @ self._own_bias(f"{module}.v")

    def _own_bias(self, linear: str) -> np.ndarray:
        bias = self._official(f"{linear}.bias").astype(np.float32)
        entering = _input_owner(linear)
        return np.asarray(bias + self._weight(linear) @ self._mean(entering) if entering in self._means else bias)

    def _mean(self, linear: str) -> np.ndarray:
        """The mean input in this graph: for O without V's bias, if that moved behind O."""
        mean = self._means[linear].astype(np.float32)
        moved = linear.endswith(".o") and f"{linear}.bias" in self._moved
        return np.asarray(mean - self._own_bias(f"{linear[:-1]}v") if moved else mean)

    def _weight(self, linear: str) -> np.ndarray:
        key = f"{linear}.weight"
        weight = self._held[key] if key in self._held else self._official(key)
        return np.asarray(weight.astype(np.float32, copy=False))

    def _measure(self, key: str, parts: dict[str, np.ndarray]) -> float:
        """The scale of ``parts``, stored as one FP8 matrix ``[out, in]``.

        Also computes the biases that depend on ``parts`` while these are in memory; the file stores biases later.
        """
        self._held = parts
        for linear in (name.removesuffix(".weight") for name in parts):
            if f"{linear}.bias" in self._remade:
                self._biases[f"{linear}.bias"] = self._bias(linear)
        self._held = {}
        self._scales[key] = _scale_of(parts)
        return self._scales[key]

    def _scale_of(self, key: str) -> float:
        if kept := self._stored_codes(key):
            return min(float(codes.scale.min()) for codes in kept)
        if key not in self._scales:
            self._scales[key] = _scale_of(self._parts(key))
        return self._scales[key]

    def _parts(self, key: str) -> dict[str, np.ndarray]:
        return {name: self._official(name) for name in self._names(key)}

    def _names(self, key: str) -> list[str]:
        """Official names of the matrices whose rows form the stored matrix ``key``."""
        module, name, leaf = key.rsplit(".", 2)
        return [f"{module}.{part}.{leaf}" for part in (name if name in JOINED else [name])]

    def _head_scale(self, module: str, name: str) -> np.ndarray:
        """The scale of Q or K: RMSNorm over D channels is at most sqrt(D) times its weight; centring may double K."""
        largest = float(np.abs(self._official(f"{module}.norm_{name}.weight").astype(np.float32)).max())
        bound = largest * self._spec.width**0.5 * (self._spec.head_width**-0.5 if name == "q" else 2.0)
        return np.array(max(bound, 1e-6) * MARGIN / FLOAT8_MAX, np.float32)


def scales_differ(parts: Sequence[Codes]) -> bool:
    """True if the rows of the matrix that ``parts`` form have different scales."""
    return len({float(scale) for codes in parts for scale in np.unique(codes.scale)}) > 1


def moved_biases(quantised: Collection[str], input_scales: Collection[str]) -> frozenset[str]:
    """The biases of V and O that differ from the checkpoint's because V's bias moved; ``quantised``: FP8 weights."""
    modules = [key.removesuffix(".o.weight") for key in quantised if key.endswith("_attn.o.weight")]
    return frozenset(
        f"{module}.{part}.bias" for module in modules if f"{module}.o" not in input_scales for part in "vo"
    )


def remade_biases(
    quantised: Collection[str], input_scales: Collection[str], input_means: Collection[str]
) -> frozenset[str]:
    """All biases that differ from the checkpoint's."""
    stems = [key.removesuffix(".weight").rsplit(".", 1) for key in quantised]
    linears = [f"{module}.{part}" for module, name in stems for part in (name if name in JOINED else [name])]
    centred = frozenset(f"{linear}.bias" for linear in linears if _input_owner(linear) in input_means)
    return centred | moved_biases(quantised, input_scales)


def _input_owner(linear: str) -> str:
    """The linear under whose name the input is recorded: q for q, k and v of self-attention."""
    module, name = linear.rsplit(".", 1)
    return f"{module}.q" if module.endswith("self_attn") and name in "qkv" else linear


def _without_nan(key: str, pieces: Iterable[Array]) -> Iterator[Array]:
    """``pieces`` of stored E4M3 codes, of which two are NaN."""
    for piece in pieces:
        if any((piece.view(np.uint8) == code).any() for code in NAN_CODES):
            check_finite(key, np.array([np.nan], np.float32))
        yield piece


def _scale_of(parts: Mapping[str, np.ndarray]) -> float:
    largest = 1e-12
    for name, part in parts.items():
        ends = extremes(part)
        check_finite(name, ends)
        largest = max(largest, *(float(abs(end)) for end in ends))
    return largest / FLOAT8_MAX


def _quantise(matrix: np.ndarray, scale: float) -> Iterator[np.ndarray]:
    """Quantise in cache-sized blocks, so that memory is read and written only once."""
    import torch

    elements, block = as_torch(matrix.reshape(-1)), torch.empty(BLOCK_ELEMENTS)
    for start in range(0, len(elements), PIECE_ELEMENTS):
        piece = elements[start : start + PIECE_ELEMENTS]
        result = torch.empty(len(piece), dtype=torch.float8_e4m3fn)
        for place in range(0, len(piece), BLOCK_ELEMENTS):
            part = piece[place : place + BLOCK_ELEMENTS]
            values = block[: len(part)].copy_(part).div_(scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
            result[place : place + len(part)] = values
        yield np.asarray(result.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn))
