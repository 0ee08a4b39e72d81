"""The checkpoint of the reference, which must be the one that the engines were made from, and its boundary.

The boundary between the experts comes from the checkpoint itself, not from the bundle or the exporter, which may be
wrong.
"""

import json
from dataclasses import replace
from pathlib import Path

from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from runtime.request import CompleteRequest
from validate.reference.loras import with_loras
from wan22.bundle import Manifest
from wan22.errors import UserError
from wan22.progress import Progress, silent
from wan22.specs import TRAIN_TIMESTEPS

OFFICIAL = {"t2v": 0.875, "i2v": 0.9}  # model_type → boundary, from wan/configs of the official code


def open_same_model(where: Path | str, engines: Path, manifest: Manifest, progress: Progress = silent) -> Checkpoint:
    """Open the checkpoint at ``where`` with the LoRAs of ``manifest``.

    Raises:
        UserError: the engines were made from another checkpoint, or a LoRA file is missing or has changed.
    """
    checkpoint = open_checkpoint(where, progress)
    ours = (manifest.spec.name, manifest.source.fingerprint)
    theirs = (checkpoint.spec.name, checkpoint.source.fingerprint)
    if ours != theirs or manifest.spec != replace(checkpoint.spec, sampling=manifest.spec.sampling):
        raise UserError(
            f"{engines} was made from {ours[0]}, fingerprint {ours[1][:12]} ({manifest.source.checkpoint})",
            f"{theirs[0]}, fingerprint {theirs[1][:12]} ({where})",
            "name the checkpoint that was exported, or export this one",
        )
    return with_loras(checkpoint, manifest)


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
