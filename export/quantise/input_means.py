"""Mean inputs of linears, measured on the 16-bit model: the FP8 graph subtracts them and the bias restores them.

``W x = W (x - m) + W m``: the second term is a constant, computed in float32 at export. Channels that are large for
every token would otherwise be rounded coarsely for each token and then multiplied by rounded weights. A file holds, by
expert and official name of the linear, ``low_noise.blocks.0.ffn.2.input_mean`` [in] float32 and ``...weight_scale``,
the largest weight over 448, which identifies the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.checkpoint.schema import dit_tensors
from export.files.safetensors_file import read_safetensors, write_safetensors
from export.files.tensor_file import Array, Planned
from export.quantise.input_scales import LinearScales, Scales
from wan22.errors import UserError
from wan22.parts import DitSpec
from wan22.specs import ModelSpec

# Linears with centred inputs. k and v of cross-attention read the text, which is quantised once for all blocks.
CENTRED = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True, eq=False)
class InputMeans:
    """The mean inputs of one expert."""

    inputs: Mapping[str, Array]  # [in] float32, by linear ("blocks.0.ffn.2"; q stands for q, k and v)
    weights: Scales  # the largest weight of each linear, which identifies the model


def input_width(spec: DitSpec, linear: str) -> int:
    return spec.ffn_width if linear.endswith("ffn.2") else spec.width


def read_input_means(path: Path, spec: ModelSpec) -> dict[str, InputMeans]:
    """The means of every expert in the file.

    Raises:
        UserError: the file is missing, describes another model's linears, or holds NaN or infinity.
    """
    found: dict[str, tuple[dict[str, Array], dict[str, LinearScales]]] = {}
    known, tensors = dit_tensors(spec.dit), read_safetensors(path)
    for name, stored in tensors.items():
        expert, _, rest = name.partition(".")
        linear, _, leaf = rest.rpartition(".")
        if leaf == "weight_scale":
            continue
        expected = (input_width(spec.dit, linear),)
        if expert not in spec.experts or f"{linear}.weight" not in known or stored.shape != expected:
            raise UserError(f"{path}: {name} {list(stored.shape)}", f"means of {spec.name}", "calibrate this model")
        mean = np.array(stored.read(), np.float32)
        if not np.isfinite(mean).all():
            raise UserError(f"{path}: {name} holds NaN or infinity", "finite means", "calibrate again")
        scale = tensors.get(f"{expert}.{linear}.weight_scale")
        inputs, weights = found.setdefault(expert, ({}, {}))
        inputs[linear] = mean
        weights[linear] = LinearScales(1.0, float(scale.read().item()) if scale else None)
    return {expert: InputMeans(*both) for expert, both in found.items()}


def write_input_means(path: Path, means: Mapping[str, InputMeans]) -> None:
    """Write the file that :func:`read_input_means` reads."""
    tensors: dict[str, Array] = {}
    for expert, part in means.items():
        for linear, mean in part.inputs.items():
            tensors[f"{expert}.{linear}.input_mean"] = np.asarray(mean, np.float32)
            tensors[f"{expert}.{linear}.weight_scale"] = np.array(part.weights[linear].weight or 0.0, np.float32)
    planned = {name: Planned(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, planned, lambda name: [tensors[name]])
