"""Static FP8 scales of activations, measured on the 16-bit model.

The layout is that of NVIDIA's TensorRT-Model-Connect, keyed by diffusers' names of the linears:
``{"blocks.0.ffn.net.0.proj": {"input_scale": s, "weight_scale": w}, ...}``, where ``s`` times 448 is the largest input
seen plus a margin, and ``w`` times 448 the largest weight. Two experts have a section each, ``{"high_noise": {...},
"low_noise": {...}}``; a file without sections applies to every expert. Linears without an entry are scaled per token.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.checkpoint.keys import diffusers_names
from export.graphs.linear import FLOAT8_MAX
from wan22.errors import UserError
from wan22.inputs import check_regular
from wan22.specs import ModelSpec

MARGIN = 1.1  # over the largest input seen, same as NVIDIA's file
COMPARED = 6  # linears per expert whose weights are compared with the file's
LARGEST_MARGIN = 1.25  # factor: a file may add a margin to its weights, the same for all of them
SAME_WITHIN = 1.02  # factor, beyond that margin: checkpoints may round


@dataclass(frozen=True)
class LinearScales:
    input: float  # largest input, margin included, over 448
    weight: float | None = None  # largest weight over 448


Scales = Mapping[str, LinearScales]  # by official name of the linear, "blocks.0.ffn.0"


def read_input_scales(path: Path, spec: ModelSpec) -> dict[str, Scales]:
    """The scales of every expert in the file.

    Raises:
        UserError: the file is missing, has another layout or another model's linears, or a scale is not positive.
    """
    check_regular(path)
    try:
        content = json.loads(path.read_text())
        by_expert = content.keys() and content.keys() <= set(spec.experts)
        found: dict[str, dict[str, LinearScales]] = {}
        for expert, part in (content if by_expert else dict.fromkeys(spec.experts, content)).items():
            found[expert] = {}
            for name, entry in part.items():
                weight = entry.get("weight_scale")
                found[expert][name] = LinearScales(
                    float(entry["input_scale"]), None if weight is None else float(weight)
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        layout = isinstance(error, (KeyError, TypeError, AttributeError, UnicodeError))
        reason = getattr(error, "strerror", None) or ("another layout" if layout else str(error))
        raise UserError(f"{path}: {reason}", "a JSON of input scales by linear", "write one with calibrate") from None
    names = {theirs.removesuffix(".weight"): ours for ours, theirs in diffusers_names("dit", spec).items()}
    if not all(found.values()):
        raise UserError(f"{path} has no scales", "scales of at least one linear", "write one with calibrate")
    for part in found.values():
        if unknown := [name for name in part if name not in names]:
            raise UserError(f"{path}: {unknown[0]}", f"linears of {spec.name}", "use scales measured on this model")
        for name, scales in part.items():
            for scale in (scales.input, 1.0 if scales.weight is None else scales.weight):
                if not (math.isfinite(scale) and scale > 0):
                    raise UserError(f"{path}: scale {scale} of {name}", "a positive number", "calibrate again")
    return {
        expert: {names[name].removesuffix(".weight"): scales for name, scales in part.items()}
        for expert, part in found.items()
    }


def check_weights(path: Path, scales: Scales, expert: str, read: Callable[[str], np.ndarray]) -> None:
    """Refuse scales of another model by comparing a few of the file's largest weights with the matrices of ``read``.

    Models of one size share all names, so only the weights distinguish their files.

    Raises:
        UserError: the weights differ.
    """
    stated = sorted((name, found.weight) for name, found in scales.items() if found.weight is not None)
    margin = None
    for name, scale in stated[:: max(1, len(stated) // COMPARED)][:COMPARED]:
        largest = largest_magnitude(read(f"{name}.weight"))
        ratio = scale * FLOAT8_MAX / max(largest, 1e-12)
        margin = ratio if margin is None else margin
        alike = 1 / SAME_WITHIN < ratio / margin < SAME_WITHIN
        if not (alike and 1 / LARGEST_MARGIN < ratio < LARGEST_MARGIN):
            stated_weight = f"{path}: weights of {name} up to {scale * FLOAT8_MAX:.3g}"
            expected = f"{largest:.3g} like the checkpoint's {expert}"
            raise UserError(stated_weight, expected, "use scales measured on this model")


def largest_magnitude(array: np.ndarray) -> float:
    return max(float(array.max()), -float(array.min()))


def write_input_scales(path: Path, scales: Mapping[str, Scales], spec: ModelSpec) -> None:
    """Write the file that :func:`read_input_scales` reads; ``scales`` by expert."""
    names = diffusers_names("dit", spec)
    parts = {
        expert: {
            names[f"{name}.weight"].removesuffix(".weight"): {"input_scale": s.input, "weight_scale": s.weight}
            for name, s in part.items()
        }
        for expert, part in scales.items()
    }
    content = parts if len(spec.experts) > 1 else parts[spec.experts[0]]
    path.write_text(json.dumps(content, indent=2) + "\n")
