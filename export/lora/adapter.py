"""The configuration of an adapter: scale, ranks and kind, in the formats of peft, diffusers and finetrainers."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from wan22.errors import DAMAGED_JSON, UserError

BESIDE = "adapter_config.json"  # peft
IN_HEADER = "lora_adapter_metadata"  # diffusers; its keys begin with the transformer's name
FINETRAINERS = "lora_config"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
KINDS = ("LORA", "LOHA", "LOKR")


class AdapterConfig(msgspec.Struct):
    """An adapter's configuration. Alpha (``alpha`` for LoHa and LoKr, else ``lora_alpha``) defaults to the rank."""

    peft_type: str = "LORA"
    r: float | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    rank_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False

    def alpha_of(self, path: str) -> float | None:
        """The alpha of a module; patterns are regular expressions for the end of its path, as in peft."""
        default = self.alpha if self.peft_type in ("LOHA", "LOKR") else self.lora_alpha
        return _first_match(self.alpha_pattern, path, default)

    def rank_of(self, path: str) -> float | None:
        return _first_match(self.rank_pattern, path, self.r)

    def scale(self, alpha: float, rank: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(patterns: Mapping[str, float], path: str, default: float | None) -> float | None:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


Configs = Mapping[str, AdapterConfig]  # by "transformer", "transformer_2"; "" for all others


def read_configs(path: Path, metadata: Mapping[str, str]) -> tuple[Configs, list[str]]:
    """The configurations of the adapter with the matrices in ``path``, and warnings for the user.

    Raises:
        UserError: a configuration is invalid, or its kind is not supported.
    """
    found: dict[str, AdapterConfig] = {"": AdapterConfig()}
    warnings: list[str] = []
    beside = path.parent / BESIDE
    if beside.is_file():
        if _owns(path):
            found[""] = _config(path, BESIDE, _decoded(path, BESIDE, beside.read_bytes()))
        else:
            warnings.append(f"LoRA {path}: {BESIDE} next to it is not read, because the folder has other weights too")
    if text := metadata.get(FINETRAINERS):
        found[""] = _config(path, FINETRAINERS, _decoded(path, FINETRAINERS, text.encode()))
        warnings.append(f"LoRA {path}: scaled as trained ({FINETRAINERS}); diffusers and ComfyUI scale it by 1")
    if text := metadata.get(IN_HEADER):
        content = _decoded(path, IN_HEADER, text.encode())
        prefixes = {key.partition(".")[0] for key in content if key.startswith("transformer")} or {"transformer"}
        for prefix in prefixes:
            own = {key.removeprefix(f"{prefix}."): value for key, value in content.items()}
            found[prefix] = _config(path, IN_HEADER, own)
        if prefixes == {"transformer"}:
            found[""] = found["transformer"]
    return found, warnings


def config_files(path: Path) -> list[Path]:
    """The files next to ``path`` that determine how it is merged."""
    beside = path.parent / BESIDE
    return [beside] if beside.is_file() and _owns(path) else []


def _owns(path: Path) -> bool:
    """True if the configuration next to ``path`` belongs to it."""
    if path.stem.startswith("adapter_model"):
        return True
    return [file for file in path.parent.iterdir() if file.suffix in WEIGHT_SUFFIXES] == [path]


def _decoded(path: Path, source: str, text: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except DAMAGED_JSON as error:
        _refuse(path, f"{source}: {error}")


def _config(path: Path, source: str, content: Mapping[str, Any]) -> AdapterConfig:
    try:
        config = msgspec.convert({key: value for key, value in content.items() if value is not None}, AdapterConfig)
        for pattern in (*config.alpha_pattern, *config.rank_pattern):
            re.compile(pattern)
    except (msgspec.MsgspecError, re.error) as error:
        _refuse(path, f"{source}: {error}")
    if config.peft_type not in KINDS:
        expected = f"one of {', '.join(KINDS)}"
        raise UserError(f"LoRA {path}: an adapter of type {config.peft_type}", expected, "use another file")
    numbers = [config.lora_alpha, config.alpha, config.r, *config.alpha_pattern.values(), *config.rank_pattern.values()]
    if not all(math.isfinite(number) for number in numbers if number is not None):
        _refuse(path, f"{source}: a scale that is not finite")
    return config


def _refuse(path: Path, found: str) -> NoReturn:
    raise UserError(f"LoRA {path}: {found}", "the adapter's configuration as JSON", "use another file")
