"""Checkpoints of a training that is interrupted and resumed: written beside, then moved into place."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer


def save(path: Path, model: nn.Module, optimisers: Sequence[Optimizer], step: int) -> None:
    """Replaces ``path`` at once; whoever reads it finds a whole checkpoint."""
    beside = path.with_suffix(".partial")
    states = [optimiser.state_dict() for optimiser in optimisers]
    torch.save({"model": model.state_dict(), "optimisers": states, "step": step}, beside)
    beside.replace(path)


def resumed(path: Path, model: nn.Module, optimisers: Sequence[Optimizer]) -> int:
    """Loads what ``path`` holds, if there is one, and returns the steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(kept)
    return int(state["step"])


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return found
