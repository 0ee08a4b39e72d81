"""Which expert a LoRA is for: what the user says, else its keys, else its metadata, else its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from export.checkpoint.describe import named_expert

EXPERTS = {"high": "high_noise", "low": "low_noise"}
SHORT = {expert: short for short, expert in EXPERTS.items()}
NAMED_IN = ("model_type", "expert", "ss_output_name", "modelspec.title", "name")  # of the metadata that trainers write


def expert_of_file(path: Path, metadata: Mapping[str, str]) -> str | None:
    """Which expert the metadata, the name of the file, or else of its folder speak for."""
    stated = next((found for key in NAMED_IN if (found := named_expert(metadata.get(key, "")))), None)
    return stated or named_expert(path.stem) or named_expert(path.absolute().parent.name)


def misplaced(path: Path, experts: Sequence[str], name: str | None = None) -> list[str]:
    """A warning for each expert among ``experts`` that the name of the file, or else of its folder, speaks against."""
    name = name or expert_of_file(path, {})
    others = [short for short, expert in EXPERTS.items() if expert in experts and name and short != name]
    return [f"LoRA {path}: named {name}, merged into the {other}-noise expert" for other in others]
