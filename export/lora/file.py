"""A LoRA file → what it adds to which official weight; headers and alphas are read, the matrices stay in the file."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from export.checkpoint.checkpoint import READABLE
from export.checkpoint.schema import Shapes, dit_tensors
from export.files.safetensors_file import read_metadata, read_safetensors
from export.files.tensor_file import Stored
from export.lora.keys import LEAF, UNSUPPORTED, KeyReader, Role
from wan22.errors import UserError
from wan22.specs import ModelSpec

F32 = npt.NDArray[np.float32]
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers keeps the adapter's configuration under this key


@dataclass(frozen=True)
class LowRank:
    """``scale``·(up·down): ``down`` is [rank, in], ``up`` [out, rank], ``scale`` alpha/rank."""

    down: Stored
    up: Stored
    scale: float

    def times(self, strength: float) -> F32:
        import torch

        down, up = (torch.from_numpy(_float32(stored)).flatten(1) for stored in (self.down, self.up))
        product: F32 = (up @ down).mul_(strength * self.scale).numpy()
        return product


@dataclass(frozen=True)
class Full:
    """A difference as large as the tensor it changes."""

    stored: Stored
    scale: float = 1.0

    def times(self, strength: float) -> F32:
        return _float32(self.stored) * np.float32(strength * self.scale)


Deltas = dict[str, list[LowRank | Full]]  # by official name


@dataclass
class _Module:
    path: str
    stored: dict[Role, Stored] = field(default_factory=dict)


class AdapterConfig(msgspec.Struct):
    """What a diffusers file says of its scale; without it alpha is the rank."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False

    def alpha(self, path: str) -> float | None:
        for pattern, alpha in self.alpha_pattern.items():
            if path == pattern or path.endswith(f".{pattern}"):
                return alpha
        return self.lora_alpha


def read_lora(path: Path, spec: ModelSpec) -> tuple[Deltas, list[str]]:
    """Deltas by official weight name, and the keys for which the transformers of ``spec`` have no weight.

    Raises:
        UserError: no file or a damaged one, another decomposition than LoRA's, shapes of another model.
    """
    tensors, config = read_safetensors(path), _adapter_config(path)
    if config.use_dora:
        _refuse(path, "a DoRA")
    modules, unmatched = _modules(path, tensors, KeyReader.for_model(spec))
    deltas: Deltas = {}
    shapes = dit_tensors(spec.dit)
    for name, module in modules.items():
        for leaf, delta in _deltas(path, module, config):
            _check_shape(path, module.path, delta, shapes, name + leaf, spec.name)
            deltas.setdefault(name + leaf, []).append(delta)
    return deltas, unmatched


def _modules(path: Path, tensors: Mapping[str, Stored], reader: KeyReader) -> tuple[dict[str, _Module], list[str]]:
    modules: dict[str, _Module] = {}
    unmatched = []
    for key, stored in tensors.items():
        if any(mark in key for mark in UNSUPPORTED):
            _refuse(path, f"{key}, no plain LoRA")
        meaning = reader.read(key)
        if meaning is None:
            unmatched.append(key)
            continue
        if stored.dtype not in READABLE and meaning.role != Role.ALPHA:  # some alphas are integers
            _refuse(path, f"{key} is {stored.dtype}", "float32, bfloat16 or float16")
        module = modules.setdefault(meaning.module, _Module(meaning.path))
        if meaning.role in module.stored:
            _refuse(path, f"{key} is a second {meaning.role} of {meaning.module}", "one")
        module.stored[meaning.role] = stored
    return modules, unmatched


def _deltas(path: Path, module: _Module, config: AdapterConfig) -> Iterator[tuple[str, LowRank | Full]]:
    """What of the module changes (".weight", ".bias", ".modulation") and by what."""
    stored, scale = module.stored, 1.0
    pair = stored.keys() & {Role.DOWN, Role.UP, Role.UP_BIAS}
    if pair:
        if missing := {Role.DOWN, Role.UP} - pair:
            _refuse(path, f"{module.path} has no {', '.join(sorted(missing))}", "both halves of every pair")
        down, up = stored[Role.DOWN], stored[Role.UP]
        scale = _scale(path, module, config)
        yield ".weight", LowRank(down, up, scale)
    if Role.UP_BIAS in stored:
        yield ".bias", Full(stored[Role.UP_BIAS], scale)
    for role in (Role.DIFF, Role.DIFF_BIAS, Role.DIFF_MODULATION):
        if role in stored:
            yield LEAF[role], Full(stored[role])


def _scale(path: Path, module: _Module, config: AdapterConfig) -> float:
    """alpha/rank. No alpha, or an alpha of 0 as musubi-tuner writes it, stands for the rank itself."""
    shape = module.stored[Role.DOWN].shape
    rank = shape[0] if shape else 0
    alpha = config.alpha(module.path)
    if stored := module.stored.get(Role.ALPHA):
        values = _float32(stored).ravel()
        alpha = float(values[0]) if values.size == 1 else math.nan
    if alpha is not None and not math.isfinite(alpha):
        _refuse(path, f"alpha of {module.path}", "one finite number")
    if not alpha or not rank:
        return 1.0
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _check_shape(path: Path, module: str, delta: LowRank | Full, shapes: Shapes, target: str, model: str) -> None:
    expected = shapes[target]
    if isinstance(delta, Full):
        found, fits = f"{list(delta.stored.shape)}", delta.stored.shape == expected
    else:
        down, up = delta.down.shape, delta.up.shape
        found = f"{list(up)}·{list(down)}"
        fits = min(len(down), len(up)) >= 2 and prod(up[1:]) == down[0]
        fits = fits and (up[0], prod(down[1:])) == (expected[0], prod(expected[1:]))
    if not fits:
        _refuse(path, f"{module} has shape {found}", f"{list(expected)} of {model}", "use a LoRA made for this model")


def _adapter_config(path: Path) -> AdapterConfig:
    text = read_metadata(path).get(ADAPTER_METADATA)
    if text is None:
        return AdapterConfig()
    try:
        content = msgspec.json.decode(text, type=dict[str, Any])
        fields = {key.removeprefix("transformer."): value for key, value in content.items()}
        return msgspec.convert(fields, AdapterConfig)
    except msgspec.MsgspecError as error:
        _refuse(path, f"{ADAPTER_METADATA}: {error}", "the adapter's configuration as JSON")


def _float32(stored: Stored) -> F32:
    """A writable copy."""
    return stored.read().astype(np.float32)


def _refuse(path: Path, found: str, expected: str = "LoRA pairs, diff, diff_b or diff_m", remedy: str = "") -> NoReturn:
    raise UserError(f"LoRA {path}: {found}", expected, remedy or "use another file")
