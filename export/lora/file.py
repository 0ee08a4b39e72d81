"""Read a LoRA file into deltas by official weight. Headers and alphas are read now, matrices when needed."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from export.checkpoint.schema import Shapes, dit_tensors
from export.files.safetensors_file import read_metadata, read_safetensors
from export.files.tensor_file import BFLOAT16, FLOAT8, Stored
from export.files.torch_reader import read_torch
from export.lora.adapter import WEIGHT_SUFFIXES, AdapterConfig, read_configs
from export.lora.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Whole, fits
from export.lora.keys import HADA, LEAF, LOKR, PAIR, UNSUPPORTED, KeyReader, Role
from wan22.errors import UserError
from wan22.specs import ModelSpec

READABLE = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16, *FLOAT8)
EXPERT_OF = {"transformer": "high_noise", "transformer_1": "high_noise", "transformer_2": "low_noise"}
NAMES_SHOWN = 5
USUAL_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")

Deltas = dict[str, list[Delta]]  # by official name


@dataclass(frozen=True)
class LoraFile:
    """``deltas`` by the expert that the keys name, or ""."""

    deltas: Mapping[str, Deltas]
    unmatched: Sequence[str]  # keys without a weight in the transformers
    warnings: Sequence[str]
    metadata: Mapping[str, str]


@dataclass
class _Module:
    path: str
    config: AdapterConfig
    stored: dict[Role, Stored] = field(default_factory=dict)


def lora_file(path: Path) -> Path:
    """The file of matrices at ``path``, which may be the folder of an adapter.

    Raises:
        UserError: the folder has no such file, or several.
    """
    if not path.is_dir():
        return path
    for name in USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:NAMES_SHOWN]) or "no weights"
        raise UserError(f"LoRA {path} holds {names}", "one LoRA", "name its file, and each LoRA separately")
    return found[0]


def read_lora(path: Path, spec: ModelSpec) -> LoraFile:
    """The LoRA in the file ``path`` for the transformers of ``spec``.

    Raises:
        UserError: the file is missing or damaged, the decomposition is not supported, or shapes differ from the model.
    """
    torch_file = path.suffix in WEIGHT_SUFFIXES[1:]
    tensors = read_torch(path) if torch_file else read_safetensors(path)
    metadata = {} if torch_file else read_metadata(path)
    configs, warnings = read_configs(path, metadata)
    modules, unmatched = _modules(path, tensors, KeyReader.for_model(spec), configs)
    shapes, left_out = dit_tensors(spec.dit), []
    found: dict[str, Deltas] = {}
    for (expert, name), module in modules.items():
        for leaf, delta in _deltas(path, module):
            if _other_channels(name + leaf, delta, shapes):
                left_out.append(f"{name}{leaf} {delta.shown}, {list(shapes[name + leaf])} in {spec.name}")
                continue
            _check_shape(path, module.path, delta, (shapes[name + leaf], spec.name))
            found.setdefault(expert, {}).setdefault(name + leaf, []).append(delta)
    if left_out:
        warnings = [*warnings, f"LoRA {path}: made for another input, left out {'; '.join(left_out)}"]
    return LoraFile(found, unmatched, warnings, metadata)


def _modules(
    path: Path, tensors: Mapping[str, Stored], reader: KeyReader, configs: Mapping[str, AdapterConfig]
) -> tuple[dict[tuple[str, str], _Module], list[str]]:
    """The modules by expert and official name, and the keys without a meaning."""
    meanings = {key: reader.read(key) for key in tensors}
    marks = {meaning.transformer for meaning in meanings.values() if meaning}
    split = bool(marks & {"transformer_1", "transformer_2"})  # else "transformer." may be either expert
    modules: dict[tuple[str, str], _Module] = {}
    for key, meaning in meanings.items():
        for mark, what in UNSUPPORTED.items():
            if mark in key.lower():
                _refuse(path, f"{key} makes it {what}")
        if meaning is None:
            continue
        stored = tensors[key]
        if stored.dtype not in READABLE and meaning.role != Role.ALPHA:  # some alphas are integers
            _refuse(path, f"{key} is {stored.dtype}", "float32, bfloat16, float16 or float8")
        expert = EXPERT_OF.get(meaning.transformer, "") if split else ""
        config = configs.get(meaning.transformer, configs[""])
        module = modules.setdefault((expert, meaning.module), _Module(meaning.path, config))
        if meaning.role in module.stored:
            _refuse(path, f"{key} is a second {meaning.role} of {meaning.module}", "one")
        module.stored[meaning.role] = stored
    return modules, [key for key, meaning in meanings.items() if meaning is None]


def _deltas(path: Path, module: _Module) -> Iterator[tuple[str, Delta]]:
    """The changes of the module: its leaf (".weight", ".bias", ".modulation") and the delta."""
    stored = module.stored
    for role, kind in ((Role.WHOLE, Whole), (Role.WHOLE_BIAS, Whole), (Role.WHOLE_MODULATION, Whole)):
        if role in stored:
            yield LEAF.get(role, ".weight"), kind(stored[role])
    difference = _difference(path, module)
    if Role.MAGNITUDE in stored or module.config.use_dora:
        if difference is None or Role.MAGNITUDE not in stored:
            missing = "its matrices" if difference is None else "its magnitudes"
            _refuse(path, f"{module.path} is a DoRA without {missing}", "both")
        yield ".weight", Decomposed(difference, stored[Role.MAGNITUDE])
    elif difference is not None:
        yield ".weight", difference
    if Role.UP_BIAS in stored:
        yield ".bias", Full(stored[Role.UP_BIAS], difference.scale if difference else 1.0)
    for role in (Role.DIFF, Role.DIFF_BIAS, Role.DIFF_MODULATION):
        if role in stored:
            yield LEAF.get(role, ".weight"), Full(stored[role])


def _difference(path: Path, module: _Module) -> LowRank | Hadamard | Kronecker | None:
    stored, config = module.stored, module.config
    kinds = [kind for kind in (PAIR, HADA, LOKR) if stored.keys() & kind]
    if len(kinds) > 1:
        _refuse(path, f"{module.path} has {', '.join(sorted(stored.keys() & (PAIR | HADA | LOKR)))}", "one kind")
    if kinds == [PAIR]:
        down, up = _all(path, module, Role.DOWN, Role.UP)
        return LowRank(down, up, _scale(path, module, _rows(down)))
    if kinds == [HADA]:
        halves = _all(path, module, Role.HADA_W1_A, Role.HADA_W1_B, Role.HADA_W2_A, Role.HADA_W2_B)
        return Hadamard((halves[0], halves[1]), (halves[2], halves[3]), _scale(path, module, _rows(halves[1])))
    if kinds == [LOKR]:
        w1 = _side(path, module, (Role.LOKR_W1, Role.LOKR_W1_A, Role.LOKR_W1_B))
        w2 = _side(path, module, (Role.LOKR_W2, Role.LOKR_W2_A, Role.LOKR_W2_B))
        factored = [side for side in (w2, w1) if len(side) > 1]
        if config.peft_type == "LOKR":  # peft scales all; others ignore alpha without a rank
            return Kronecker(w1, w2, _scale(path, module, config.rank_of(module.path) or 0))
        return Kronecker(w1, w2, _scale(path, module, _rows(factored[0][1])) if factored else 1.0)
    if Role.ALPHA in stored:
        _scale(path, module, 1)  # checks even an alpha without matrices
    return None


def _side(path: Path, module: _Module, roles: tuple[Role, Role, Role]) -> tuple[Stored, ...]:
    whole, *factors = roles
    return (module.stored[whole],) if whole in module.stored else tuple(_all(path, module, *factors))


def _all(path: Path, module: _Module, *roles: Role) -> list[Stored]:
    if missing := [role for role in roles if role not in module.stored]:
        _refuse(path, f"{module.path} has no {', '.join(sorted(missing))}", "both halves of every pair")
    return [module.stored[role] for role in roles]


def _rows(stored: Stored) -> int:
    return stored.shape[0] if stored.shape else 0


def _scale(path: Path, module: _Module, rank: float) -> float:
    """alpha/rank. Alpha defaults to the rank, as does musubi-tuner's alpha of 0."""
    alpha = module.config.alpha_of(module.path)
    if stored := module.stored.get(Role.ALPHA):
        values = stored.read().astype(np.float64).ravel()
        alpha = float(values[0]) if values.size == 1 else math.nan
    if alpha is not None and not math.isfinite(alpha):
        _refuse(path, f"alpha of {module.path}", "one finite number")
    return module.config.scale(alpha, rank) if alpha and rank else 1.0


def _other_channels(name: str, delta: Delta, shapes: Shapes) -> bool:
    """True for a patch embedding of other input channels, as in text-to-video LoRAs on image-to-video models."""
    expected, found = shapes[name], delta.shape
    differ = isinstance(delta, Full) and name == "patch_embedding.weight" and len(found) == len(expected)
    return differ and found[1] != expected[1] and (found[0], *found[2:]) == (expected[0], *expected[2:])


def _check_shape(path: Path, module: str, delta: Delta, target: tuple[tuple[int, ...], str]) -> None:
    expected, model = target
    if not fits(delta, expected):
        found = f"{module} has shape {delta.shown}"
        _refuse(path, found, f"{list(expected)} of {model}", "use a LoRA made for this model")


def shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")


KNOWN = "LoRA, LoHa, LoKr, DoRA or differences"


def _refuse(path: Path, found: str, expected: str = KNOWN, remedy: str = "") -> NoReturn:
    raise UserError(f"LoRA {path}: {found}", expected, remedy or "use another file")
