"""What a key of a LoRA file means: which official module it changes, and how (wan22.md §8.1).

Five families share one grammar: an optional prefix, a module path (official, diffusers or with underscores), a suffix.
So a key is read by its parts, and files that mix families, as distilled LoRAs do, need no rule of their own.
"""

from dataclasses import dataclass
from enum import StrEnum

from export.checkpoint.keys import diffusers_names
from wan22.specs import ModelSpec


class Role(StrEnum):
    DOWN = "lora_down"  # A: [rank, in]
    UP = "lora_up"  # B: [out, rank]
    UP_BIAS = "bias of lora_up"
    ALPHA = "alpha"
    DIFF = "diff"  # full deltas
    DIFF_BIAS = "diff_b"
    DIFF_MODULATION = "diff_m"


# What of a module each role changes.
LEAF = {
    Role.DOWN: ".weight",
    Role.UP: ".weight",
    Role.ALPHA: ".weight",
    Role.DIFF: ".weight",
    Role.UP_BIAS: ".bias",
    Role.DIFF_BIAS: ".bias",
    Role.DIFF_MODULATION: ".modulation",
}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "lora_unet_")
_SUFFIXES = {
    ".lora_down.weight": Role.DOWN,
    ".lora_A.weight": Role.DOWN,
    ".lora_A.default.weight": Role.DOWN,
    ".lora_up.weight": Role.UP,
    ".lora_B.weight": Role.UP,
    ".lora_B.default.weight": Role.UP,
    ".lora_B.bias": Role.UP_BIAS,
    ".lora_B.default.bias": Role.UP_BIAS,
    ".alpha": Role.ALPHA,
    ".diff": Role.DIFF,
    ".diff_b": Role.DIFF_BIAS,
    ".diff_m": Role.DIFF_MODULATION,
}
# Other decompositions: dropping such a key and merging the rest would give weights that nobody trained.
UNSUPPORTED = ("dora_scale", "lora_magnitude_vector", "lora_mid.", "hada_", "lokr_", "oft_")


@dataclass(frozen=True)
class Meaning:
    module: str  # official, without ".weight"
    role: Role
    path: str  # the module as the file calls it, without prefix


@dataclass(frozen=True)
class KeyReader:
    """Reads the keys of LoRAs for one model. ``targets`` maps every spelling of a weight to its official name."""

    targets: dict[str, str]

    @classmethod
    def for_model(cls, spec: ModelSpec) -> "KeyReader":
        names = diffusers_names("dit", spec)
        underscored = {_underscored(name): name for name in names}
        return cls(
            underscored | {diffusers: name for name, diffusers in names.items()} | {name: name for name in names}
        )

    def read(self, key: str) -> Meaning | None:
        """What ``key`` means, or None where the model has nothing of that name."""
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        for suffix, role in _SUFFIXES.items():
            path = key.removesuffix(suffix)
            if path != key and (target := self.targets.get(path + LEAF[role])):
                return Meaning(target.removesuffix(LEAF[role]), role, path)
        return None


def _underscored(name: str) -> str:
    """``blocks.0.ffn.0.weight`` → ``blocks_0_ffn_0.weight``."""
    module, _, leaf = name.rpartition(".")
    return f"{module.replace('.', '_')}.{leaf}"
