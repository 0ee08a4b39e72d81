"""Turn quantised files into plain tensors: every key is a tensor, a scale or a description, and all scales are applied.

Publishers use different names for scales and pack codes differently, but the meaning is the same
(``docs/checkpoints.md``). A key without a role stays a tensor; the schema check refuses it if the model has none of
that name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from export.files.decoded import CODES, Decoded, Mxfp8, Nvfp4, Scaled, Tensor
from export.files.tensor_file import FLOAT8, Stored
from wan22.errors import UserError

MARKS = ("scaled_fp8", "spiece_model")  # keys that are not tensors
ROLES = (  # by suffix; the first match counts
    (".weight._data", "codes"),
    (".weight._scale", "scale"),
    (".int8_weight", "codes"),
    (".weight_scale_2", "second"),
    (".weight_global_scale", "divisor"),
    (".weight_scale", "scale"),
    (".scale_weight", "scale"),
    (".scale_input", "activation"),
    (".input_scale", "activation"),
    (".output_scale", "activation"),
    (".input_absmax", "activation"),
    (".input_global_scale", "input global"),
    (".pre_quant_scale", "columns"),
    (".comfy_quant", "format"),
)
FOREIGN = {  # unsupported formats, by their keys
    ".weight.absmax": "bitsandbytes 4 bits",
    ".weight.quant_map": "bitsandbytes 4 bits",
    ".encoded_exponent": "DFloat11",
    ".sign_mantissa": "DFloat11",
    ".qzeros": "AWQ or GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".wscales": "Nunchaku (SVDQuant)",
}
CHECKED_MAX_BYTES = 2**20  # of scales to check in advance; all are checked again while being written
UNSCALED = "use a bf16, fp16, fp8_scaled or GGUF version of the model"


@dataclass
class _Module:
    """The keys of one linear, by role."""

    keys: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)


def apply_scales(part: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``part`` with scales applied.

    Raises:
        UserError: a scale is missing or not positive, or the format is not supported.
    """
    for key in tensors:
        for mark, kind in FOREIGN.items():
            if key.endswith(mark) or f"{mark}." in key:
                raise UserError(f"{part}: {key}, so this is {kind}", "a supported format", UNSCALED)
    found: dict[str, Tensor] = {}
    modules = _modules(tensors)
    formats = _formats(part, modules, metadata)
    for key, tensor in tensors.items():
        if _is_mark(key):
            continue
        name, role = _role(key, tensors)
        if role == "tensor":
            found[key] = tensor
        elif role == "codes":
            found[f"{name}.weight"] = _decode(part, name, modules[name], formats.get(name, {}))
    _refuse_orphans(part, modules)
    if any(key.rpartition(".")[2] == "scaled_fp8" for key in tensors):
        bare = [key for key, tensor in found.items() if isinstance(tensor, Scaled) and not tensor.scales]
        if bare:
            _refuse(part, f"{bare[0]} is {found[bare[0]].path.name}'s scaled FP8 without its scale", "a scale for each")
    return found


def _is_mark(key: str) -> bool:
    return key.rpartition(".")[2] in MARKS


def _role(key: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The module and role of a key; "tensor" for one that is not quantised."""
    for suffix, role in ROLES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    module, _, leaf = key.rpartition(".")
    if leaf == "scale" and f"{module}.int8_weight" in tensors:
        return module, "scale"
    if leaf == "alpha" and f"{module}.input_global_scale" in tensors:  # LightX2V's, not a LoRA's
        return module, "second"
    tensor = tensors[key]
    coded = isinstance(tensor, Stored) and (tensor.dtype in CODES or tensor.dtype == np.uint8)
    if coded and leaf == "weight":
        return module, "codes"
    return key, "tensor"


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for key, tensor in tensors.items():
        name, role = _role(key, tensors)
        if role == "tensor" or _is_mark(key) or not isinstance(tensor, Stored):
            continue
        module = modules.setdefault(name, _Module())
        if role in module.keys and role != "activation":
            raise UserError(f"{key} and {module.keys[role]}", f"only one {role} of {name}", "download the file again")
        module.keys[role], module.stored[role] = key, tensor
    return modules


def _formats(part: str, modules: Mapping[str, _Module], metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """ComfyUI's description of each module, from its tensor or from the header, where names may have a prefix."""
    found: dict[str, dict[str, Any]] = {}
    try:
        content = json.loads(metadata.get("_quantization_metadata", "{}"))
        for name, description in content.get("layers", {}).items():
            ends = [module for module in modules if name == module or name.endswith(f".{module}")]
            found |= {module: dict(description) for module in ends}
        for name, module in modules.items():
            if "format" in module.stored:
                found[name] = dict(json.loads(module.stored["format"].read().tobytes()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        _refuse(part, f"a description of quantised layers: {error}", "ComfyUI's JSON")
    return found


def _decode(part: str, name: str, module: _Module, description: Mapping[str, Any]) -> Decoded:
    codes, kind = module.stored["codes"], str(description.get("format", ""))
    _check_scales(part, module)
    scales = tuple(module.stored[role] for role in ("scale", "second") if role in module.stored)
    columns = module.stored.get("columns")
    if kind == "mxfp8" or ("scale" in module.stored and _is_powers(module.stored["scale"])):
        if kind != "mxfp8" or columns is not None:
            _refuse(part, f"{name} has scales that are powers of two ({kind or 'MX format'})", "mxfp8 of ComfyUI")
        return Mxfp8(codes, module.stored["scale"])
    if codes.dtype == np.uint8:
        return _nvfp4(part, name, module, kind)
    if kind not in ("", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
        _refuse(part, f"{name} is {kind}", "float8_e4m3fn, float8_e5m2, int8_tensorwise, nvfp4 or mxfp8")
    if codes.dtype not in FLOAT8 and not scales:
        _refuse(part, f"{name} is {codes.dtype} without a scale", "a scale for every quantised weight")
    if scales and not _fits(scales[0].shape, codes.shape):
        found = f"{module.keys['scale']} has shape {list(scales[0].shape)}"
        _refuse(part, found, f"one scale, or one for every row or block of {list(codes.shape)}")
    turned = int(description.get("convrot_groupsize", 0)) if description.get("convrot") else 0
    if turned and (len(codes.shape) != 2 or codes.shape[1] % turned or not _is_power_of_4(turned)):
        _refuse(part, f"{name} is rotated in groups of {turned}", "a power of 4 that divides its inputs")
    return Scaled(codes, scales, columns, turned, _entering(part, module))


def _entering(part: str, module: _Module) -> Stored | None:
    """ModelOpt's static scale of the inputs. ComfyUI's ``scale_input`` is not used: it is 1 in most files."""
    key, stored = module.keys.get("activation", ""), module.stored.get("activation")
    if stored is None or not key.endswith(".input_scale") or np.prod(stored.shape, dtype=np.int64) != 1:
        return None
    value = float(stored.read().astype(np.float32).reshape(-1)[0])
    if not (np.isfinite(value) and value > 0):
        _refuse(part, f"{key} holds the scale {value:g}", "a positive number", "download it again")
    return stored if module.keys.get("scale", "").endswith(".weight_scale") else None


def _nvfp4(part: str, name: str, module: _Module, kind: str) -> Decoded:
    stored = module.stored
    if "scale" not in stored or stored["scale"].dtype not in FLOAT8 or len(stored["codes"].shape) != 2:
        _refuse(part, f"{name} is of 4 bits ({kind or 'uint8'}) without block scales", "NVFP4")
    if kind not in ("", "nvfp4"):
        _refuse(part, f"{name} is {kind}", "nvfp4")
    rows, inputs = stored["codes"].shape[0], 2 * stored["codes"].shape[1]
    tiled = kind == "nvfp4" or "divisor" in stored or "input global" in stored
    blocks = np.prod(stored["scale"].shape, dtype=np.int64)
    expected = (-(-rows // 128) * 128) * (-(-inputs // 64) * 4) if tiled else rows * inputs // 16
    if blocks != expected or inputs % 16:
        _refuse(part, f"{name} has {blocks} block scales", f"{expected} for {rows}x{inputs}")
    if "divisor" in stored:
        return Nvfp4(stored["codes"], stored["scale"], (stored["divisor"],), tiled=True, divided=True)
    if "second" not in stored:
        _refuse(part, f"{name} is NVFP4 without its second scale", "weight_scale_2, weight_global_scale or alpha")
    worlds = (stored["second"], *([stored["input global"]] if "input global" in stored else []))
    return Nvfp4(stored["codes"], stored["scale"], worlds, high_first=kind == "nvfp4", tiled=tiled)


def _is_powers(stored: Stored) -> bool:
    return stored.dtype == np.uint8 or stored.dtype.name == "float8_e8m0fnu"


def _is_power_of_4(number: int) -> bool:
    return number >= 4 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


def _fits(scale: tuple[int, ...], codes: tuple[int, ...]) -> bool:
    if np.prod(scale, dtype=np.int64) == 1 or (codes and scale in {(codes[0],), (codes[0], 1)}):
        return True
    if len(scale) == 3 and len(codes) == 2:
        return scale[0] == codes[0] and scale[2] == 1 and codes[1] % scale[1] == 0
    whole = len(scale) == len(codes) == 2 and 0 not in scale
    blocks = zip(codes, scale, strict=True) if whole else ()
    return whole and all(-(-size // -(-size // count)) == count for size, count in blocks)


def _check_scales(part: str, module: _Module) -> None:
    for role in ("scale", "second", "divisor", "columns"):
        stored = module.stored.get(role)
        if stored is None or _is_powers(stored) or stored.size_bytes > CHECKED_MAX_BYTES:
            continue
        values = stored.read().astype(np.float32)
        blocks = stored.dtype in FLOAT8  # a block of zeros has the scale zero
        sound = np.isfinite(values).all() and (values >= 0 if blocks else values > 0).all()
        if not sound and role != "columns":
            wrong = values[~(np.isfinite(values) & (values > 0))].ravel()[0]
            _refuse(part, f"{module.keys[role]} holds the scale {wrong:g}", "positive numbers", "download it again")


def _refuse_orphans(part: str, modules: Mapping[str, _Module]) -> None:
    for name, module in modules.items():
        orphans = [key for role, key in module.keys.items() if role in ("scale", "second", "divisor", "columns")]
        if "codes" not in module.keys and orphans:
            kind = "MXFP8's powers of two" if _is_powers(module.stored[_role_of(module, orphans[0])]) else "a scale"
            found = f"{part}: {orphans[0]}, a scaled FP8 repack ({kind} without its codes)"
            raise UserError(found, f"quantised codes as {name}.weight", "download the file again, or use another")


def _role_of(module: _Module, key: str) -> str:
    return next(role for role, named in module.keys.items() if named == key)


def _refuse(part: str, found: str, expected: str, remedy: str = UNSCALED) -> NoReturn:
    raise UserError(f"{part}: {found}", expected, remedy)
