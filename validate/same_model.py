"""Opens the checkpoint that engines are compared with, which must be the one they were made from."""

from dataclasses import replace
from pathlib import Path

from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from wan22.bundle import Manifest
from wan22.errors import UserError
from wan22.progress import Progress


def open_same_model(where: Path | str, engines: Path, manifest: Manifest, progress: Progress) -> Checkpoint:
    """Open the checkpoint at ``where``. Raises UserError if the engines were made from another one."""
    checkpoint = open_checkpoint(where, progress)
    ours = (manifest.spec.name, manifest.source.fingerprint)
    theirs = (checkpoint.spec.name, checkpoint.source.fingerprint)
    if ours != theirs or manifest.spec != replace(checkpoint.spec, sampling=manifest.spec.sampling):
        raise UserError(
            f"{engines} was made from {ours[0]}, fingerprint {ours[1][:12]} ({manifest.source.checkpoint})",
            f"{theirs[0]}, fingerprint {theirs[1][:12]} ({where})",
            "name the checkpoint that was exported, or export this one",
        )
    return checkpoint
