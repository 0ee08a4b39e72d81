"""Merge LoRAs into weights as they stream, one tensor at a time: W' = W + strength·(alpha/rank)·(B·A), or the formulas
of :mod:`export.lora.deltas` for other kinds.

Merging happens in float32, before any rounding or quantisation (wan22.md §8.1). PyTorch computes the product, so the
merged weights equal a merge in PyTorch bit for bit.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.checkpoint import Weights
from export.files.decoded import Codes, Nvfp4
from export.files.tensor_file import Stored
from export.lora.adapter import WEIGHT_SUFFIXES, config_files
from export.lora.experts import EXPERTS, SHORT, expert_of_file, misplaced
from export.lora.file import Deltas, LoraFile, lora_file, read_lora, shown
from wan22.bundle import MergedLora, sha256_of
from wan22.errors import UserError
from wan22.specs import ModelSpec

SYNTAX = "FILE[@STRENGTH][:high|:low]"
MOST_STRENGTH = 1000
WEIGHT_FILE = "|".join(re.escape(suffix) for suffix in WEIGHT_SUFFIXES)
ARGUMENT = re.compile(
    rf"(?P<file>.+(?:{WEIGHT_FILE})|.+?)(?:@(?P<first>[^@:/]*))?(?::(?P<expert>[^:/]*))?(?::(?P<last>[^:/]*))?"
)


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA chosen by the user: a file, or the folder of an adapter. Without ``expert`` ("high" or "low") it is merged
    into the transformer in its keys, metadata or name, or into every transformer if they name none.
    """

    path: Path
    strength: float = 1.0
    expert: str | None = None


@dataclass(frozen=True)
class Lora:
    """An opened LoRA: its deltas by expert and official weight."""

    choice: LoraChoice
    file: Path
    deltas: Mapping[str, Deltas]
    unmatched: tuple[str, ...]  # keys without a weight in the model
    warnings: tuple[str, ...]  # for the user, one line each

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.deltas)

    def record(self) -> MergedLora:
        """The entry for the bundle; hashes the files."""
        config = "".join(sha256_of(path) for path in config_files(self.file))
        return MergedLora(str(self.file), sha256_of(self.file), self.choice.strength, self.experts, config)


@dataclass(frozen=True)
class MergedWeights:
    """``Weights`` of ``expert`` with LoRAs in order; changed tensors are float32 and merged when read."""

    base: Weights
    loras: tuple[Lora, ...]
    expert: str

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32) if self._changes(name) else self.base.dtype(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        weight = self.base.read(name)
        for lora in self.loras:
            for delta in lora.deltas[self.expert].get(name, ()):
                weight = delta.merged(weight.astype(np.float32, copy=False), lora.choice.strength)
                _check_finite(lora, name, weight)
        return weight

    def pieces(self, name: str) -> Iterable[npt.NDArray[Any]]:
        return [self.read(name)] if self._changes(name) else self.base.pieces(name)

    def stored(self, name: str) -> Stored | None:
        return None if self._changes(name) else self.base.stored(name)

    def codes(self, name: str) -> Codes | Nvfp4 | None:
        return None if self._changes(name) else self.base.codes(name)

    def _changes(self, name: str) -> bool:
        return any(name in lora.deltas[self.expert] for lora in self.loras)


def parse_lora(argument: str, found: str = "", syntax: str = SYNTAX) -> LoraChoice:
    """Parse ``FILE.safetensors[@STRENGTH][:EXPERT[:STRENGTH]]``; FILE may be a .pt file or the folder of an adapter.

    The strength stands in one of the two places. Errors begin with ``found`` and quote ``syntax``.
    """
    found = found or f"LoRA {argument!r}"
    if not (match := ARGUMENT.fullmatch(argument)):
        raise UserError(found, syntax, "name a safetensors file")
    file, *strengths, expert = match.group("file", "first", "last", "expert")
    if expert is not None and (expert or strengths[1] is None) and SHORT.get(expert, expert) not in EXPERTS:
        raise UserError(f"{found}: expert {expert!r}", "high or low", f"write {syntax}")
    written = [finite_strength(found, text, syntax) for text in strengths if text is not None]
    if len(written) > 1:
        raise UserError(f"{found}: two strengths", "one", f"write {syntax}")
    return LoraChoice(Path(file), written[0] if written else 1.0, SHORT.get(expert, expert) or None)


def finite_strength(found: str, text: str, syntax: str) -> float:
    """The number in ``text``. Raises UserError, which begins with ``found``, for none, or one of absurd size."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST_STRENGTH:
        expected = f"a number from -{MOST_STRENGTH} to {MOST_STRENGTH}"
        raise UserError(f"{found}: strength {text!r}", expected, f"write {syntax}")
    return value


def open_lora(choice: LoraChoice, spec: ModelSpec, *, ignore_unmatched: bool = False) -> Lora:
    """Open a LoRA of any dialect for the transformers of ``spec``.

    Raises:
        UserError: the file is missing or damaged, the LoRA is for another model or of an unsupported kind, or keys have
            no weight to change.
    """
    if not math.isfinite(choice.strength):
        raise UserError(f"LoRA {choice.path}: strength {choice.strength}", "a finite number", f"write {SYNTAX}")
    if choice.expert is not None and len(spec.experts) == 1:
        raise UserError(f"LoRA for the {choice.expert}-noise expert", f"none, {spec.name} has one", "leave it off")
    file = lora_file(choice.path)
    content = read_lora(file, spec)
    warnings = list(content.warnings)
    if content.unmatched:
        found = f"{len(content.unmatched)} keys without a weight in {spec.name}: {shown(content.unmatched)}"
        if not content.deltas or not ignore_unmatched:
            remedy = _remedy(content) if content.deltas else "use a LoRA made for this model"
            raise UserError(f"LoRA {file}: {found}", "keys of this model", remedy)
        warnings.append(f"LoRA {file}: left out {found}")
    if not content.deltas:
        raise UserError(f"LoRA {file} is empty", "keys of this model", "use another file")
    deltas, notes = _by_expert(choice, file, content, spec)
    return Lora(choice, file, deltas, tuple(content.unmatched), (*warnings, *notes))


def _remedy(content: LoraFile) -> str:
    """The remedy for keys without a weight."""
    leave = "with --lora-ignore-unmatched"
    if any("text_enc" in key or "lora_te" in key for key in content.unmatched):
        return f"it also changes a text encoder, which is not supported: merge the transformer's part {leave}"
    if any("_img" in key or "img_emb" in key for key in content.unmatched):
        return f"Wan2.1's image branch, which Wan2.2 lacks: leave it out {leave}"
    return f"leave them out {leave}"


def _by_expert(
    choice: LoraChoice, file: Path, content: LoraFile, spec: ModelSpec
) -> tuple[dict[str, Deltas], list[str]]:
    """The deltas by the experts that the LoRA is merged into, and warnings for the user."""
    keyed = [SHORT[expert] for expert in content.deltas if expert]
    if len(spec.experts) == 1:
        if keyed:
            found = f"LoRA {file}: keys for the {' and '.join(sorted(keyed))}-noise expert"
            raise UserError(found, f"{spec.name}, which has one transformer", "use a LoRA made for this model")
        return {spec.experts[0]: content.deltas[""]}, []
    common = content.deltas.get("", {})
    if keyed:
        chosen = [choice.expert] if choice.expert else sorted(keyed)
        if not set(chosen) & set(keyed):
            found = f"LoRA {file}: its keys are for the {keyed[0]}-noise expert"
            raise UserError(found, f":{keyed[0]}", f"leave :{choice.expert} off")
        return {EXPERTS[short]: _join(common, content.deltas[EXPERTS[short]]) for short in chosen}, []
    name = expert_of_file(file, content.metadata)
    if choice.expert:
        return {EXPERTS[choice.expert]: common}, misplaced(file, [EXPERTS[choice.expert]], name)
    if name is None:
        return dict.fromkeys(spec.experts, common), []
    other = "low" if name == "high" else "high"
    found = f"LoRA {file}: named {name}, merged into the {name}-noise expert alone"
    return {EXPERTS[name]: common}, [f"{found}; add it with :{other} to merge it into the {other}-noise expert"]


def _join(first: Deltas, second: Deltas) -> Deltas:
    return {name: [*first.get(name, ()), *second.get(name, ())] for name in first | second}


def merged(weights: Weights, loras: Sequence[Lora], expert: str) -> Weights:
    """``weights`` of ``expert`` with those ``loras`` that are for it."""
    meant = tuple(lora for lora in loras if expert in lora.experts)
    return MergedWeights(weights, meant, expert) if meant else weights


def _check_finite(lora: Lora, name: str, change: npt.NDArray[np.float32]) -> None:
    if not math.isfinite(float(change.max())) or not math.isfinite(float(change.min())):
        raise UserError(f"LoRA {lora.choice.path}: NaN or infinity for {name}", "finite weights", "use another file")
