"""The expert that a LoRA is for: by the user's choice, else its keys, else its metadata, else its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from export.checkpoint.describe import named_expert

EXPERTS = {"high": "high_noise", "low": "low_noise"}
SHORT = {expert: short for short, expert in EXPERTS.items()}
NAMED_IN = ("model_type", "expert", "ss_output_name", "modelspec.title", "name")  # trainers' metadata


def expert_of_file(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The expert in the metadata, or else in the name of the file or its folder; None without one."""
    stated = next((found for key in NAMED_IN if (found := named_expert(metadata.get(key, "")))), None)
    return stated or named_expert(path.stem) or named_expert(path.absolute().parent.name)


def misplaced(path: Path, experts: Sequence[str], name: str | None = None) -> list[str]:
    """A warning for each of ``experts`` that contradicts the name of the file or its folder."""
    name = name or expert_of_file(path, {})
    others = [short for short, expert in EXPERTS.items() if expert in experts and name and short != name]
    return [f"LoRA {path}: named {name}, merged into the {other}-noise expert" for other in others]
