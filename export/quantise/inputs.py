"""What is measured on the inputs of an expert's linears: means, factors that even out their channels, and crests.

A quantised graph subtracts the mean from each row, and the bias restores it. Channels that are large for every token
would otherwise be rounded coarsely for each token and then multiplied by rounded weights. The rest is multiplied by the
factors, by which the columns of the matrix are divided before they are rounded: ``sqrt(largest weight / largest
input)`` of every channel, over their median, moves half of an outlier into the matrix (SmoothQuant, arXiv 2211.10438).

The crest of rows is their largest magnitude over their root mean square. It decides what INT8 costs: a row that is
divided by its largest magnitude and rounded to 127 steps errs by crest / 440 of itself, since a uniform rounding error
is 1 / sqrt(12) of a step. FP8 errs by 2.6 % whatever the row, so INT8 is the better one below a crest of 11.5.

A file holds, by expert and official name of the linear, ``low_noise.blocks.0.ffn.2.input_mean`` [in] float32, where
INT8 uses them also ``input_factor`` [in] and ``crest`` [], and ``weight_scale``, the largest weight over 448, which
identifies the model. ``low_noise.forwards.video``, ``.time_features`` and ``.text`` are parts of the forwards that were
run, from which an export computes the rows that it rounds matrices for; all rows would take gigabytes.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.checkpoint.schema import dit_tensors
from export.files.safetensors_file import read_safetensors, write_safetensors
from export.files.tensor_file import Array, Planned, Stored
from export.graphs.linear import kind_of
from export.graphs.taps import Forwards
from export.quantise.input_scales import LinearScales, Scales
from wan22.errors import UserError
from wan22.parts import DitSpec
from wan22.specs import PATCH, TEXT_TOKENS, ModelSpec

# Linears with centred inputs. k and v of cross-attention read the text, which is quantised once for all blocks.
CENTRED = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
CREST_TO_ERROR = 440.0  # 127 · sqrt(12)
FP8_ERROR = 0.026  # of a row, whatever its values
LARGEST_INT8_CREST = 11.5  # beyond, FP8 errs less: FP8_ERROR · CREST_TO_ERROR
FORWARDS = ("video", "time_features", "text")
SMOOTHED_SHARE = 0.5  # of an outlier that moves into the matrix; 0.4 to 0.75 do as well


@dataclass(frozen=True, eq=False)
class MeasuredInput:
    """The input of one linear ("blocks.0.ffn.2"; q stands for q, k and v)."""

    mean: Array  # float32 [in]
    factor: Array | None = None  # float32 [in]
    crest: float | None = None  # of the rows without their mean, times the factors
    rows: Array | None = None  # bfloat16 [rows, in], some inputs, for matrices that are rounded for them

    @property
    def prepared_rows(self) -> Array:
        """The rows as the linear multiplies them: without their mean, times the factors; none without rows."""
        if self.rows is None:
            return np.zeros((0, len(self.mean)), np.float32)
        centred = self.rows.astype(np.float32) - np.asarray(self.mean, np.float32)
        return np.asarray(centred if self.factor is None else centred * np.asarray(self.factor, np.float32))

    @property
    def vectors(self) -> tuple[Array, Array]:
        """Mean and factors; ones without factors."""
        return self.mean, np.ones(len(self.mean), np.float32) if self.factor is None else self.factor


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """The measured inputs of one expert."""

    inputs: Mapping[str, MeasuredInput]  # by linear
    weights: Scales  # the largest weight of each linear, which identifies the model
    forwards: Forwards | None = None  # of the runs that were measured


def input_width(spec: DitSpec, linear: str) -> int:
    return spec.ffn_width if linear.endswith("ffn.2") else spec.width


def crests_by_kind(inputs: Mapping[str, MeasuredInput]) -> dict[str, float]:
    """The crest of the inputs of all linears of a kind ("ffn.2") together; kinds without a measured crest are left out.

    A precision is chosen by kind, so that all blocks compute alike.
    """
    found: dict[str, list[float]] = {}
    for linear, measured in inputs.items():
        if measured.crest is not None:
            found.setdefault(kind_of(linear), []).append(measured.crest)
    return {kind: math.sqrt(statistics.fmean(crest**2 for crest in of)) for kind, of in found.items()}


def too_peaked(inputs: Mapping[str, MeasuredInput]) -> dict[str, float]:
    """The kinds of linears that err less in FP8 than in INT8, and their crest."""
    return {kind: crest for kind, crest in crests_by_kind(inputs).items() if crest > LARGEST_INT8_CREST}


def column_maxima(read: Callable[[str], Array], linear: str) -> Array:
    """The largest weight [in] of every column of the matrices that read the input of ``linear``."""
    parts = [f"{linear[:-1]}{part}" for part in "qkv"] if linear.endswith("self_attn.q") else [linear]
    magnitudes = (np.abs(np.asarray(read(f"{part}.weight"), np.float32)).max(0) for part in parts)
    largest: Array = np.maximum.reduce(list(magnitudes))
    return largest


def smoothing_factors(largest_input: Array, largest_weight: Array) -> Array:
    """The factors [in] for an input of such channel maxima and a matrix of such column maxima; their median is 1."""
    entering, weight = (np.asarray(a, np.float32) for a in (largest_input, largest_weight))
    known = (entering > 0) & (weight > 0)
    if not known.any():
        return np.ones_like(entering)
    floor = 1e-3 * float(np.median(entering[known]))  # a channel that is nearly constant needs no larger factor
    ratio = weight[known] ** (1 - SMOOTHED_SHARE) / np.maximum(entering[known], floor) ** SMOOTHED_SHARE
    factors = np.ones_like(entering)
    factors[known] = ratio / np.median(ratio)
    return factors


def read_inputs(path: Path, spec: ModelSpec) -> dict[str, ExpertInputs]:
    """The measured inputs of every expert in the file.

    Raises:
        UserError: the file is missing, describes another model's linears, or holds NaN, infinity or what no rows have.
    """
    found: dict[str, tuple[dict[str, MeasuredInput], dict[str, LinearScales]]] = {}
    known, tensors = dit_tensors(spec.dit), read_safetensors(path)
    for name in (name for name in tensors if name.endswith(".input_mean")):
        expert, _, rest = name.removesuffix(".input_mean").partition(".")
        width = input_width(spec.dit, rest)
        shapes = {"input_mean": (width,), "input_factor": (width,), "crest": (), "weight_scale": ()}
        stored = {leaf: tensors.get(f"{expert}.{rest}.{leaf}") for leaf in shapes}
        for leaf, expected in shapes.items():
            tensor = stored[leaf]
            if tensor is None:
                continue
            if expert not in spec.experts or f"{rest}.weight" not in known or tensor.shape != expected:
                told = f"{path}: {expert}.{rest}.{leaf} {list(tensor.shape)}"
                raise UserError(told, f"means of {spec.name}", "calibrate this model")
        values = {leaf: np.array(tensor.read(), np.float32) for leaf, tensor in stored.items() if tensor is not None}
        _check_values(f"{path}: {expert}.{rest}", values)
        inputs, weights = found.setdefault(expert, ({}, {}))
        crest = float(values["crest"]) if "crest" in values else None
        inputs[rest] = MeasuredInput(values["input_mean"], values.get("input_factor"), crest)
        weights[rest] = LinearScales(1.0, float(values["weight_scale"]) if "weight_scale" in values else None)
    if not found:
        raise UserError(f"{path} has no means", f"means of {spec.name}", "write them with wan-trt calibrate --means")
    return {expert: ExpertInputs(*both, _forwards(path, expert, tensors, spec.dit)) for expert, both in found.items()}


def _forwards(path: Path, expert: str, tensors: Mapping[str, Stored], dit: DitSpec) -> Forwards | None:
    """The parts of forwards of ``expert`` in the file, if it has them."""
    stored = {leaf: found for leaf in FORWARDS if (found := tensors.get(f"{expert}.forwards.{leaf}")) is not None}
    if not stored:
        return None
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in stored.items()}
    if not _are_forwards(shapes, dit):
        raise UserError(
            f"{path}: {expert}.forwards {list(shapes.values())}", "forwards of this model", "calibrate again"
        )
    values = {leaf: np.array(tensor.read(), np.float32) for leaf, tensor in stored.items()}
    _check_values(f"{path}: {expert}.forwards", values)
    return Forwards(**values)


def _are_forwards(shapes: Mapping[str, tuple[int, ...]], dit: DitSpec) -> bool:
    video, text = shapes.get("video", ()), shapes.get("text", ())
    if len(video) != 5 or len(text) != 3 or min(*video, *text) < 1:
        return False
    runs, channels, *sides = video
    whole = not any(side % patch for side, patch in zip(sides, PATCH, strict=True))
    alike = shapes.get("time_features") == (runs, dit.freq_width) and text[0] in (1, runs)
    return whole and alike and channels == dit.in_channels and text[1] <= TEXT_TOKENS and text[2] == dit.text_width


def _check_values(what: str, values: Mapping[str, Array]) -> None:
    for leaf, array in values.items():
        if not np.isfinite(array).all():
            raise UserError(f"{what}.{leaf} holds NaN or infinity", "finite numbers", "calibrate again")
    if "input_factor" in values and not float(values["input_factor"].min()) > 0:
        raise UserError(f"{what}.input_factor holds 0 or less", "positive factors", "calibrate again")
    if float(values.get("weight_scale", 0.0)) < 0:
        raise UserError(f"{what}.weight_scale is negative", "0 or more", "calibrate again")
    crest, most = float(values.get("crest", 1.0)), len(values.get("input_mean", [0])) ** 0.5
    if not 1 <= crest <= most:
        raise UserError(f"{what}.crest {crest:.3g}", f"1 to {most:.3g}, as rows have", "calibrate again")


def write_inputs(path: Path, experts: Mapping[str, ExpertInputs]) -> None:
    """Write the file that :func:`read_inputs` reads."""
    tensors: dict[str, Array] = {}
    for expert, part in experts.items():
        for linear, measured in part.inputs.items():
            values = {"input_mean": measured.mean, "input_factor": measured.factor, "crest": measured.crest}
            for leaf, value in (values | {"weight_scale": part.weights[linear].weight or 0.0}).items():
                if value is not None:
                    tensors[f"{expert}.{linear}.{leaf}"] = np.asarray(value, np.float32)
        for leaf in FORWARDS if part.forwards is not None else ():
            tensors[f"{expert}.forwards.{leaf}"] = getattr(part.forwards, leaf)
    planned = {name: Planned(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, planned, lambda name: [tensors[name]])
