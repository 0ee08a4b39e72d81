"""Describe a file of weights: the part, model and format. Only headers are read, and only damaged files are refused."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.other_models import other_model
from export.checkpoint.part_files import PREFIXES, PREFIXES_OF, without_prefix
from export.checkpoint.spelling import name_officially
from export.checkpoint.tokenizer import GGUF_CHARSMAP
from export.files.decoded import GgufBlocks, Tensor
from export.files.weights_files import WeightsFile, read_weights

MODELS = {  # (width, input channels) of transformers
    (5120, 16): "T2V-A14B expert, or Wan2.1 T2V 14B, which has the same shapes",
    (5120, 36): "I2V-A14B expert",
    (3072, 48): "TI2V-5B",
    (1536, 16): "Wan2.1 T2V 1.3B: not supported",
    (5120, 52): "Wan2.2 Fun Control: not supported",
}
FORMS = (  # by the last words of keys, or keys of the header; the first with all marks present counts
    ({"comfy_quant"}, "ComfyUI quantised, format 1.0"),
    ({"_quantization_metadata"}, "ComfyUI quantised, format 1.0"),
    ({"scaled_fp8", "scale_input"}, "ComfyUI fp8_scaled"),
    ({"scaled_fp8"}, "fp8_scaled (Kijai or ComfyUI)"),
    ({"weight_scale_2"}, "ModelOpt NVFP4"),
    ({"weight_global_scale"}, "LightX2V NVFP4"),
    ({"weight_scale", "input_scale"}, "ModelOpt FP8"),
    ({"weight_scale"}, "LightX2V FP8 or int8, a scale for every row"),
    ({"_data", "_scale"}, "quanto int8 (Wan2GP)"),
    ({"int8_weight"}, "TurboDiffusion int8"),
)

LETTERS = {"H": "high", "L": "low"}
NO_NOISE = r"[-_ ]?(?:res|rank|poly|key|light(?!ning|x2v)|quality|speed|motion|angle|vram|mem)"


@dataclass(frozen=True)
class Description:
    """``part`` is "transformer", "text_encoder", "vae" or "" for others; ``channels`` its input's or latents'."""

    path: Path
    part: str
    model: str
    expert: str
    form: str
    types: Mapping[str, int]  # dtype → tensors
    channels: int = 0
    holds_tokenizer: bool = False

    @property
    def text(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        expert = f", {self.expert.replace('_', ' ')} by its name" if self.expert else ""
        extra = ", with its tokenizer" if self.holds_tokenizer else ""
        return f"{self.model}{expert}; {self.form}; {types}{extra}"


def describe(path: Path) -> Description:
    """The description of the file ``path``. Raises UserError if it is damaged."""
    found = read_weights(path)
    tensors = found.tensors
    types = dict(Counter(_type(tensor) for tensor in tensors.values()).most_common())
    form = _form(path, found)
    tokenizer = any(name.endswith("spiece_model") for name in tensors) or GGUF_CHARSMAP in found.metadata
    if other := other_model(tensors):
        return Description(path, "", f"{other}: not supported" if other != "a LoRA" else other, "", form, types)
    for part in ("transformer", "text_encoder", "vae"):
        own = name_officially("dit" if part == "transformer" else part, without_prefix(part, tensors))
        if described := _model(part, own):
            model, channels = described
            named = named_expert(path.stem) or named_expert(path.absolute().parent.name)
            expert = f"{named}_noise" if named and part == "transformer" and channels != 48 else ""
            return Description(path, part, model, expert, form, types, channels, tokenizer)
    return Description(path, "", "no file of Wan2.2 that is known here", "", form, types)


def _model(part: str, tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else ()
        return found if len(found) == rank else (0,) * rank

    if part == "transformer" and "blocks.0.self_attn.q.weight" in tensors:
        width, channels = shape("patch_embedding.weight", 5)[:2]
        known = MODELS.get((width, channels), f"transformer of width {width} with {channels} input channels")
        return (known if width else "transformer without patch_embedding.weight (a GGUF made without fix_5d)"), channels
    if part == "text_encoder" and "blocks.0.attn.q.weight" in tensors:
        return f"umt5 text encoder of width {shape('token_embedding.weight', 2)[1]}", 0
    if part == "vae" and "decoder.conv1.weight" in tensors:
        channels = shape("conv2.weight", 5)[0]
        return f"Wan{'2.2' if channels == 48 else '2.1'} VAE", channels
    return None


def _type(tensor: Tensor) -> str:
    if isinstance(tensor, GgufBlocks):
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(tensor.kind).name
    return tensor.dtype.name


def _form(path: Path, found: WeightsFile) -> str:
    names = list(found.tensors)
    parts = [part for part, prefixes in PREFIXES_OF.items() if any(name.startswith(prefixes) for name in names)]
    if parts and any(name.startswith(PREFIXES[0]) for name in names):
        return f"ComfyUI all-in-one checkpoint (transformer, {', '.join(parts).replace('_', ' ')})"
    if "general.architecture" in found.metadata or any(isinstance(t, GgufBlocks) for t in found.tensors.values()):
        return f"GGUF ({found.metadata.get('general.architecture', 'no architecture named')})"
    ends = {name.rpartition(".")[2] for name in names} | set(found.metadata)
    quantised = next((form for marks, form in FORMS if marks <= ends), None)
    prefixed = any(name.startswith(PREFIXES[:2]) for name in names)
    return quantised or ("with ComfyUI's prefix" if prefixed else path.suffix.removeprefix(".") or "weights")


def named_expert(name: str) -> str | None:
    """The one of "high" and "low" that ``name`` contains for noise, not for rank or resolution; None if not one."""
    found = set(re.findall(rf"(?<![a-z])(high|low)(?!{NO_NOISE})(?:[-_ ]?noise)?(?![a-z])", name.lower()))
    found |= {LETTERS[letter] for letter in re.findall(r"(?<![A-Za-z0-9])([HL])N?(?![A-Za-z0-9])", name)}
    return str(found.pop()) if len(found) == 1 else None
