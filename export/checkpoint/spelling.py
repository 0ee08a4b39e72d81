"""Map tensor names in single files of any publisher to official names.

The possible names depend only on the number of layers and the VAE's generation, so no configuration is needed.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from export.checkpoint.keys import diffusers_names, llama_names
from export.checkpoint.schema import part_tensors
from export.files.decoded import Tensor
from wan22.specs import T2V_A14B, TI2V_5B, ModelSpec

_LAYER = re.compile(r"^(?:blocks|encoder\.block|enc\.blk)\.(\d+)\.")
LAYERS_MAX = 1000


def name_officially(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map names to official ones. Unknown names are kept, so that the schema check reports them."""
    spec = _model_like(part, tensors)
    names = {theirs: name for name, theirs in diffusers_names(part, spec).items()}
    if part == "text_encoder":
        names |= {theirs: name for name, theirs in llama_names(spec).items()}
        names["encoder.embed_tokens.weight"] = "token_embedding.weight"
    names |= {name: name for name in part_tensors(part, spec)}
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def _model_like(part: str, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """A model whose ``part`` has the names of ``tensors``, with arbitrary widths."""
    nested = any(".upsamples.0.upsamples." in name or ".upsampler." in name for name in tensors)
    spec = TI2V_5B if part == "dit" or (part == "vae" and nested) else T2V_A14B
    numbers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    layers = min(max(numbers, default=0) + 1, LAYERS_MAX)
    return replace(spec, dit=replace(spec.dit, layers=layers), text_encoder=replace(spec.text_encoder, layers=layers))
