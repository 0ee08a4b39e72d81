"""The boundary between the experts, which the reference reads from the checkpoint itself.

It takes nothing from the bundle or the exporter, which may be wrong.
"""

import json

from export.checkpoint.checkpoint import Checkpoint
from runtime.request import CompleteRequest
from wan22.specs import TRAIN_TIMESTEPS

OFFICIAL = {"t2v": 0.875, "i2v": 0.9}  # model_type → boundary, from wan/configs of the official code


def stated_boundary(checkpoint: Checkpoint) -> float | None:
    """The fraction of the timestep range from which the high-noise expert runs; None with a single expert.

    ``boundary_ratio`` of ``model_index.json``, else the constant of the official code.
    """
    if len(checkpoint.spec.experts) == 1:
        return None
    index = checkpoint.folder / "model_index.json"
    stated = json.loads(index.read_text()).get("boundary_ratio") if checkpoint.source.layout == "diffusers" else None
    return OFFICIAL[str(checkpoint.spec.task)] if stated is None else float(stated)


def expert_of(boundary: float | None, request: CompleteRequest, index: int, timestep: float) -> str:
    """The expert of step ``index`` (from 0). A switch step or boundary in the request takes precedence."""
    if boundary is None:
        return "dit"
    if request.switch_step is not None:
        return "high_noise" if index < request.switch_step else "low_noise"
    share = boundary if request.boundary is None else request.boundary
    return "high_noise" if timestep >= share * TRAIN_TIMESTEPS else "low_noise"
