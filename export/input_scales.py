"""Static scales of activations in FP8, measured beforehand on the 16-bit model.

The layout is that of NVIDIA's TensorRT-Model-Connect, by diffusers' names of the linears:
``{"blocks.0.ffn.net.0.proj": {"input_scale": s, ...}, ...}``, where ``s`` times 448 is the largest input seen.
"""

import json
import math
from pathlib import Path

from export.keys import diffusers_names
from wan22.errors import UserError
from wan22.specs import ModelSpec


def read_input_scales(path: Path, spec: ModelSpec) -> dict[str, float]:
    """The scales by official names of the linears, "blocks.0.ffn.0".

    Raises:
        UserError: no such file, no such layout, linears of another model, a scale that is no positive number.
    """
    try:
        entries = json.loads(path.read_text())
        scales = {name: float(entry["input_scale"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise UserError(f"{path}: {reason}", "a JSON of input scales by linear", "write one with calibrate") from None
    names = {theirs.removesuffix(".weight"): ours for ours, theirs in diffusers_names("dit", spec).items()}
    if unknown := [name for name in scales if name not in names]:
        raise UserError(f"{path}: {unknown[0]}", f"linears of {spec.name}", "use scales measured on this model")
    if bad := [name for name, scale in scales.items() if not (math.isfinite(scale) and scale > 0)]:
        raise UserError(f"{path}: scale {scales[bad[0]]} of {bad[0]}", "a positive number", "calibrate again")
    return {names[name].removesuffix(".weight"): scale for name, scale in scales.items()}
