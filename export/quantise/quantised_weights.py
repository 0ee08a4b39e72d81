"""The tensors that a quantised graph stores in addition to the official ones, computed while the weights are streamed.

A matrix has one scale for every row, its largest magnitude over the largest code, float32 in ``weight_scale``. ``qkv``
and ``kv`` concatenate the rows of their parts. A matrix that the checkpoint stores in FP8 keeps its codes and scales.

A graph may subtract a mean from the input of a linear, which the bias restores: ``W x = W (x - m) + W m``. It may
multiply the rest by factors, by which the matrix is divided before it is rounded. A branch of low rank beside an NVFP4
matrix takes its largest singular vectors; that of codes which the checkpoint stores is zeros.

The bias of V moves behind the output projection: probabilities sum to 1, so ``O(P (V + b)) = O(P V) + O b``, and the
float32 addition there avoids rounding. If the input of O has a static scale, the bias stays in V, because the scale was
measured with it. The scales of Q and K in FP8 attention depend on the norm weights only.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np

from export.files.decoded import Codes, Nvfp4
from export.files.tensor_file import Array, check_finite, extremes
from export.graphs.linear import CODES, FLOAT8_MAX
from export.quantise.inputs import MeasuredInput
from export.quantise.nvfp4 import Nvfp4Matrix, compensated, joined, stored_matrix
from export.quantise.rounding import rounded, row_scales
from wan22.block_layout import LOW_RANK_DOWN, LOW_RANK_UP
from wan22.parts import DitSpec
from wan22.precision import Number

Read = Callable[[str], np.ndarray]

JOINED = ("qkv", "kv")
NAN_CODES = (0x7F, 0xFF)  # of E4M3
MARGIN = 1.01  # over the bound of Q and K: the norms compute in float32, but their weights may have been rounded


class QuantisedWeights:
    """The tensors of a quantised transformer, made from the official ones.

    :meth:`pieces` serves :func:`export.graphs.weights_file.write_weights`.

    Args:
        official: reads a tensor by its official name, in any floating type.
        spec: the transformer's dimensions.
        quantised: names of the weights that the graph stores as codes, and their number type.
        input_scales: static activation scales by linear ("blocks.0.ffn.0" → largest input / 448).
        inputs: the means that the graph subtracts from inputs, and the factors that it multiplies by, by linear.
        low_rank: of the branch beside every NVFP4 matrix.
        codes: returns a matrix that is already stored in FP8 or NVFP4, which is not rounded again; None for any other.
    """

    def __init__(
        self,
        official: Read,
        spec: DitSpec,
        quantised: Mapping[str, Number],
        input_scales: Mapping[str, float] | None = None,
        inputs: Mapping[str, MeasuredInput] | None = None,
        low_rank: int = 0,
        codes: Callable[[str], Codes | Nvfp4 | None] = lambda _name: None,
    ) -> None:
        self._official, self._spec, self._quantised = official, spec, quantised
        self._input_scales, self._inputs = input_scales or {}, inputs or {}
        self._low_rank, self._codes = low_rank, codes
        self._scales: dict[str, np.ndarray] = {}  # [out] of stored matrices
        self._held: dict[str, np.ndarray] = {}  # official matrices currently in memory
        self._last_fp4: dict[str, Nvfp4Matrix] = {}
        self._biases: dict[str, np.ndarray] = {}  # biases computed from them, not yet written
        self._moved = moved_biases(quantised, self._input_scales)
        self._remade = remade_biases(quantised, self._input_scales, self._inputs)

    def pieces(self, key: str) -> Iterable[np.ndarray]:
        """The elements of a tensor in order.

        Matrices are read immediately and quantised lazily, so that one thread can read while another computes.
        """
        if kept := self._stored_codes(key):
            return (piece for codes in kept for piece in _without_nan(key, codes.stored.pieces()))
        parts = self._parts(key) if key in self._quantised else {}
        return self._compute(key, parts)

    def _stored_codes(self, key: str) -> list[Codes]:
        """The stored codes of a matrix's parts if all of them have codes that the graph can hold, else none."""
        if self._quantised.get(key) is not Number.FP8 or self._factor(key) is not None:
            return []
        found = [self._codes(name) for name in self._names(key)]
        kept = [codes for codes in found if isinstance(codes, Codes)]
        return kept if len(kept) == len(found) else []

    def _compute(self, key: str, parts: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
        if not parts:
            yield self(key)
            return
        number = self._quantised[key]
        if number is Number.NVFP4:
            yield self._in_fp4(key, parts).codes
            return
        scales, first = self._measure(key, parts), 0
        for part in parts.values():
            yield from rounded(part, scales[first : first + len(part)], self._factor(key), number)
            first += len(part)

    def __call__(self, key: str) -> np.ndarray:
        stem, leaf = key.rsplit(".", 1)
        if key in self._quantised:
            return self._whole(key)
        if leaf in ("group_scale", LOW_RANK_DOWN, LOW_RANK_UP):
            return self._beside_fp4(f"{stem}.weight", leaf)
        if leaf.endswith("_scale") and not leaf.startswith("input"):
            return self._scales_of(f"{stem}.weight") if leaf == "weight_scale" else self._head_scale(stem, leaf[0])
        if leaf.startswith("input_"):
            return self._of_input(stem, leaf)
        if key in self._remade:
            return self._biases.pop(key) if key in self._biases else self._bias(stem)
        return self._official(key)

    def _of_input(self, linear: str, leaf: str) -> np.ndarray:
        """The vectors of a linear's input; zeros and ones where none was measured."""
        if leaf == "input_scale":
            return np.array(self._input_scales[linear], np.float32)
        if leaf == "input_mean":
            return self._mean(linear)
        factor = self._factor(f"{linear}.weight")
        return np.ones(self._width(linear), np.float32) if factor is None else factor

    def _whole(self, key: str) -> np.ndarray:
        """The matrix of codes ``[out, in]``."""
        if kept := self._stored_codes(key):
            return np.concatenate([piece for codes in kept for piece in _without_nan(key, [codes.stored.read()])])
        if self._quantised[key] is Number.NVFP4:
            return self._fp4(key).codes
        parts = self._parts(key)
        pieces = list(self._compute(key, parts))
        return np.concatenate(pieces).reshape(-1, next(iter(parts.values())).shape[1])

    # -- NVFP4

    def _fp4(self, key: str) -> Nvfp4Matrix:
        """The matrix ``key`` in NVFP4; the last one that was made is kept, for its scales."""
        found = self._last_fp4.get(key)
        return found if found is not None else self._in_fp4(key, self._parts(key))

    def _in_fp4(self, key: str, parts: Mapping[str, np.ndarray]) -> Nvfp4Matrix:
        """As stored by the checkpoint, else rounded for the rows that were kept."""
        self._restore_biases(parts)
        kept = [self._codes(name) for name in self._names(key)]
        factor = self._factor(key)
        if factor is None and all(isinstance(codes, Nvfp4) for codes in kept):
            made = joined([stored_matrix(codes) for codes in kept if isinstance(codes, Nvfp4)])
        else:
            matrix = np.concatenate([part.astype(np.float32) for part in parts.values()])
            check_finite(key, extremes(matrix))
            stored = matrix if factor is None else matrix / factor
            made = compensated(stored, self._rows(key, parts), self._low_rank)
        self._last_fp4 = {key: made}
        return made

    def _beside_fp4(self, key: str, leaf: str) -> np.ndarray:
        """Scales of groups of the matrix ``key``, or its branch: zeros if the checkpoint stores the matrix in NVFP4."""
        made = self._fp4(key)
        if leaf == "group_scale":
            return made.groups
        leaving, entering = len(made.codes), 2 * made.codes.shape[1]
        if leaf == LOW_RANK_DOWN:
            return np.zeros((self._low_rank, entering), np.float32) if made.down is None else made.down
        return np.zeros((leaving, self._low_rank), np.float32) if made.up is None else made.up

    def _rows(self, key: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The kept inputs ``[rows, in]`` of the stored matrix ``key``, made of ``parts``; no rows if none were kept."""
        found = self._inputs.get(_input_owner(self._names(key)[0].removesuffix(".weight")))
        width = next(iter(parts.values())).shape[1]
        return np.zeros((0, width), np.float32) if found is None else found.prepared_rows

    # -- biases and inputs

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
        return np.asarray(bias + self._weight(linear) @ self._mean(entering) if entering in self._inputs else bias)

    def _mean(self, linear: str) -> np.ndarray:
        """The mean input in this graph: for O without V's bias, if that moved behind O."""
        if linear not in self._inputs:
            return np.zeros(self._width(linear), np.float32)
        mean = np.asarray(self._inputs[linear].mean, np.float32)
        moved = linear.endswith(".o") and f"{linear}.bias" in self._moved
        return np.asarray(mean - self._own_bias(f"{linear[:-1]}v") if moved else mean)

    def _factor(self, key: str) -> np.ndarray | None:
        """The divisors [in] of the columns of the stored matrix ``key``, if its input is multiplied by them."""
        found = self._inputs.get(_input_owner(self._names(key)[0].removesuffix(".weight")))
        return None if found is None or found.factor is None else np.asarray(found.factor, np.float32)

    def _width(self, linear: str) -> int:
        return self._spec.ffn_width if linear.endswith("ffn.2") else self._spec.width

    def _weight(self, linear: str) -> np.ndarray:
        key = f"{linear}.weight"
        weight = self._held[key] if key in self._held else self._official(key)
        return np.asarray(weight.astype(np.float32, copy=False))

    # -- scales

    def _measure(self, key: str, parts: dict[str, np.ndarray]) -> np.ndarray:
        """The scales [out] of ``parts``, stored as one matrix of codes ``[out, in]``.

        Also computes the biases that depend on ``parts`` while these are in memory; the file stores biases later.
        """
        self._restore_biases(parts)
        factor, largest = self._factor(key), CODES[self._quantised[key]].largest
        scales = [row_scales(name, part, factor, largest) for name, part in parts.items()]
        self._scales[key] = np.concatenate(scales)
        return self._scales[key]

    def _restore_biases(self, parts: Mapping[str, np.ndarray]) -> None:
        """Compute the biases that depend on ``parts``."""
        self._held = dict(parts)
        for linear in (name.removesuffix(".weight") for name in parts):
            if f"{linear}.bias" in self._remade:
                self._biases[f"{linear}.bias"] = self._bias(linear)
        self._held = {}

    def _scales_of(self, key: str) -> np.ndarray:
        """The scale of every row of the matrix ``key``: float32 [out]."""
        if self._quantised.get(key) is Number.NVFP4:
            return self._fp4(key).rows
        if kept := self._stored_codes(key):
            rows = [np.broadcast_to(codes.scale, codes.stored.shape[0]) for codes in kept]
            return np.concatenate(rows).astype(np.float32)
        return self._scales[key] if key in self._scales else self._measure(key, self._parts(key))

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


def moved_biases(quantised: Collection[str], input_scales: Collection[str]) -> frozenset[str]:
    """The biases of V and O that differ from the checkpoint's because V's bias moved; ``quantised``: its matrices."""
    modules = [key.removesuffix(".o.weight") for key in quantised if key.endswith("_attn.o.weight")]
    return frozenset(
        f"{module}.{part}.bias" for module in modules if f"{module}.o" not in input_scales for part in "vo"
    )


def remade_biases(quantised: Collection[str], input_scales: Collection[str], inputs: Collection[str]) -> frozenset[str]:
    """All biases that differ from the checkpoint's."""
    stems = [key.removesuffix(".weight").rsplit(".", 1) for key in quantised]
    linears = [f"{module}.{part}" for module, name in stems for part in (name if name in JOINED else [name])]
    centred = frozenset(f"{linear}.bias" for linear in linears if _input_owner(linear) in inputs)
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
