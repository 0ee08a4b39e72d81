"""Parse a key of a LoRA file into the official module that it changes, and how (wan22.md §8.1).

All trainers share one grammar: prefixes, a module path (official or diffusers, with dots or underscores), a suffix. So
keys are parsed part by part, and files of mixed dialects, such as distilled LoRAs, need no extra rule.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from export.checkpoint.keys import diffusers_names
from wan22.specs import ModelSpec


class Role(StrEnum):
    DOWN = "lora_down"  # A: [rank, in]
    UP = "lora_up"  # B: [out, rank]
    UP_BIAS = "bias of lora_up"
    ALPHA = "alpha"
    MAGNITUDE = "dora_scale"  # DoRA: length of every row or column
    DIFF = "diff"  # full deltas
    DIFF_BIAS = "diff_b"
    DIFF_MODULATION = "diff_m"
    WHOLE = "whole weight"  # replaces the checkpoint's
    WHOLE_BIAS = "whole bias"
    WHOLE_MODULATION = "whole modulation"
    HADA_W1_A = "hada_w1_a"  # LoHa
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"
    LOKR_W1 = "lokr_w1"  # LoKr
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"


PAIR = frozenset({Role.DOWN, Role.UP, Role.UP_BIAS})
HADA = frozenset(role for role in Role if role.startswith("hada"))
LOKR = frozenset(role for role in Role if role.startswith("lokr"))

# The leaf of a module that a role changes; ".weight" by default.
LEAF = {
    Role.UP_BIAS: ".bias",
    Role.DIFF_BIAS: ".bias",
    Role.WHOLE_BIAS: ".bias",
    Role.DIFF_MODULATION: ".modulation",
    Role.WHOLE_MODULATION: ".modulation",
}
# The first match counts, so longer spellings come before those that they end with.
_SUFFIXES = (
    (r"\.lora_B(?:\.\w+)?\.bias", Role.UP_BIAS),
    (r"(?:\.lora_down|\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)(?:\.weight)?", Role.DOWN),
    (r"(?:\.lora_up|\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)(?:\.weight)?", Role.UP),
    (r"\.alpha", Role.ALPHA),
    (r"(?:\.dora_scale|\.magnitude|\.lora_magnitude_vector(?:\.\w+)?)(?:\.weight)?", Role.MAGNITUDE),
    (r"\.(?:modulation|scale_shift_table)\.diff|\.diff_m", Role.DIFF_MODULATION),
    (r"\.(?:diff_b|b_norm)", Role.DIFF_BIAS),
    (r"\.(?:diff|w_norm)", Role.DIFF),
    *((rf"\.{role}(?:\.\w+)?", role) for role in (*sorted(HADA), *sorted(LOKR, reverse=True))),
    (r"(?:\.modules_to_save(?:\.\w+)?)?\.bias", Role.WHOLE_BIAS),
    (r"(?:\.modules_to_save(?:\.\w+)?)?\.(?:modulation|scale_shift_table)", Role.WHOLE_MODULATION),
    (r"(?:\.modules_to_save(?:\.\w+)?)?\.(?:weight|set_weight)", Role.WHOLE),
)
SUFFIXES = tuple((re.compile(f"(.*?)(?:{pattern})"), role) for pattern, role in _SUFFIXES)
_PREFIX = re.compile(
    r"(?:base_model\.model|model\.diffusion_model|diffusion_model|pipe\.dit|dit|unet|model|module|_orig_mod)\."
    r"|(?P<transformer>transformer(?:_[12])?)\."
    r"|lora_unet__?|lora_transformer_|lycoris_"
)
# Other decompositions: dropping such a key and merging the rest would give wrong weights.
UNSUPPORTED = {
    "lora_mid": "a LoRA with a third matrix (LoCon of Tucker form)",
    "hada_t": "a LoHa of Tucker form",
    "lokr_t": "a LoKr of Tucker form",
    "oft_": "an OFT",
    "boft": "a BOFT",
    "glora": "a GLoRA",
    "ia3_": "an IA3",
    "vera_": "a VeRA",
    "reshape_weight": "a LyCORIS file that changes shapes",
}


@dataclass(frozen=True)
class Meaning:
    module: str  # official, without ".weight"
    role: Role
    path: str  # the module's name in the file
    transformer: str = ""  # "transformer", "transformer_1" or "transformer_2" if a prefix names it


@dataclass(frozen=True)
class KeyReader:
    """Reads the keys of LoRAs for one model. ``targets`` maps every spelling of a weight to its official name."""

    targets: dict[str, str]

    @classmethod
    def for_model(cls, spec: ModelSpec) -> "KeyReader":
        names = diffusers_names("dit", spec)
        return cls({_underscored(theirs): name for name, theirs in (*names.items(), *zip(names, names, strict=True))})

    def read(self, key: str) -> Meaning | None:
        """The meaning of ``key``; None if the model has no such weight."""
        transformer, whole = "", key.removeprefix("base_model.model.")
        while match := _PREFIX.match(key):
            key, transformer = key[match.end() :], match["transformer"] or transformer
        for pattern, role in SUFFIXES:
            if not (match := pattern.fullmatch(key)):
                continue
            leaf = LEAF.get(role, ".weight")
            if target := self.targets.get(_underscored(match[1] + leaf)):
                path = whole[: len(whole) - len(key) + len(match[1])]
                return Meaning(target.removesuffix(leaf), role, path, transformer)
        return None


def _underscored(name: str) -> str:
    """``blocks.0.ffn.0.weight`` → ``blocks_0_ffn_0.weight``."""
    module, _, leaf = name.rpartition(".")
    return f"{module.replace('.', '_')}.{leaf}"
