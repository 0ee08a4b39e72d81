"""LoRAs merged into the weights while they stream: W' = W + strength·(alpha/rank)·(B·A), one tensor at a time.

Merging comes before any rounding or quantisation: in float32, into float32 (wan22.md §8.1). The product is torch's, so
the merged weights equal a merge in PyTorch bit for bit.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.checkpoint import Weights
from export.files.tensor_file import Stored
from export.lora.file import Deltas, read_lora
from wan22.bundle import MergedLora, sha256_of
from wan22.errors import UserError, some_of
from wan22.specs import ModelSpec

SYNTAX = "FILE.safetensors[@strength][:high|:low]"
EXPERTS = {"high": "high_noise", "low": "low_noise"}
NAMES_SHOWN = 5


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA as the user asks for it; without ``expert`` ("high" or "low") it goes into every transformer."""

    path: Path
    strength: float = 1.0
    expert: str | None = None


@dataclass(frozen=True)
class Lora:
    """An opened LoRA: what it adds to which official weights of which experts."""

    choice: LoraChoice
    experts: tuple[str, ...]
    deltas: Deltas
    warnings: tuple[str, ...]  # for the user, one line each

    def record(self) -> MergedLora:
        """The entry for the bundle; hashes the file."""
        path = self.choice.path
        return MergedLora(str(path), sha256_of(path), self.choice.strength, self.experts)


@dataclass(frozen=True)
class MergedWeights:
    """``Weights`` with LoRAs added in their order; what they change is made when it is read, in float32."""

    base: Weights
    loras: tuple[Lora, ...]

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32) if self._changes(name) else self.base.dtype(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        weight = self.base.read(name)
        for lora in self.loras:
            for delta in lora.deltas.get(name, ()):
                change = delta.times(lora.choice.strength).reshape(weight.shape)
                _check_finite(lora, name, change)
                weight = np.add(weight.astype(np.float32, copy=False), change, out=change)
        return weight

    def pieces(self, name: str) -> Iterable[npt.NDArray[Any]]:
        return [self.read(name)] if self._changes(name) else self.base.pieces(name)

    def stored(self, name: str) -> Stored | None:
        return None if self._changes(name) else self.base.stored(name)

    def _changes(self, name: str) -> bool:
        return any(name in lora.deltas for lora in self.loras)


def parse_lora(argument: str) -> LoraChoice:
    """Reads ``FILE.safetensors[@strength][:high|:low]``."""
    match = re.fullmatch(r"(.+\.safetensors)(?:@([^:]*))?(?::(.*))?", argument)
    if not match:
        raise UserError(f"LoRA {argument!r}", SYNTAX, "name a safetensors file")
    file, strength, expert = match.groups()
    if expert is not None and expert not in EXPERTS:
        raise UserError(f"LoRA {argument!r}: expert {expert!r}", "high or low", f"write {SYNTAX}")
    return LoraChoice(Path(file), 1.0 if strength is None else _strength(argument, strength), expert)


def _strength(argument: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"LoRA {argument!r}: strength {text!r}", "a finite number", f"write {SYNTAX}")
    return value


def open_lora(choice: LoraChoice, spec: ModelSpec, *, ignore_unmatched: bool = False) -> Lora:
    """Opens a LoRA of any of the five families for the transformers of ``spec``.

    Raises:
        UserError: no file or a damaged one, a LoRA of another model or kind, keys without a weight to change.
    """
    experts = spec.experts
    if not math.isfinite(choice.strength):
        raise UserError(f"LoRA {choice.path}: strength {choice.strength}", "a finite number", f"write {SYNTAX}")
    if choice.expert is not None:
        if len(experts) == 1:
            raise UserError(f"LoRA for the {choice.expert}-noise expert", f"none, {spec.name} has one", "leave it off")
        experts = (EXPERTS[choice.expert],)
    deltas, unmatched = read_lora(choice.path, spec)
    warnings = misplaced(choice.path, experts)
    if unmatched:
        found = f"{len(unmatched)} keys without a weight in {spec.name}: {some_of(unmatched, NAMES_SHOWN)}"
        if not deltas or not ignore_unmatched:
            remedy = "leave them out with --lora-ignore-unmatched" if deltas else "use a LoRA made for this model"
            raise UserError(f"LoRA {choice.path}: {found}", "keys of this model", remedy)
        warnings.append(f"LoRA {choice.path}: left out {found}")
    if not deltas:
        raise UserError(f"LoRA {choice.path} is empty", "keys of this model", "use another file")
    return Lora(choice, experts, deltas, tuple(warnings))


def merged(weights: Weights, loras: Sequence[Lora], expert: str) -> Weights:
    """``weights`` of ``expert`` with those of ``loras`` added that are meant for it."""
    meant = tuple(lora for lora in loras if expert in lora.experts)
    return MergedWeights(weights, meant) if meant else weights


def misplaced(path: Path, experts: Sequence[str]) -> list[str]:
    """A warning for each expert among ``experts`` that the name of the file, or else of its folder, speaks against."""
    said = _said(path.stem) or _said(path.absolute().parent.name)
    others = [short for short, expert in EXPERTS.items() if expert in experts and said and short != said]
    return [f"LoRA {path}: named {said}, merged into the {other}-noise expert" for other in others]


def _said(name: str) -> str | None:
    """Which of "high" and "low", if ``name`` says exactly one of them of noise, and not of rank or resolution."""
    other = r"[-_ ]?(?:res|rank|poly|key|light|quality|speed|motion|angle|vram|mem)"
    found = set(re.findall(rf"(?<![a-z])(high|low)(?!{other})(?:[-_ ]?noise)?(?![a-z])", name.lower()))
    return str(found.pop()) if len(found) == 1 else None


def _check_finite(lora: Lora, name: str, change: npt.NDArray[np.float32]) -> None:
    if not math.isfinite(float(change.max())) or not math.isfinite(float(change.min())):
        raise UserError(f"LoRA {lora.choice.path}: NaN or infinity for {name}", "finite weights", "use another file")
