"""The layouts of Wan2.2 checkpoints that can be read: one module each, with the same four functions."""

from pathlib import Path
from typing import Protocol

from export.checkpoint import diffusers, official
from export.checkpoint.spec import Parts
from wan22.errors import UserError
from wan22.specs import ModelSpec


class Layout(Protocol):
    """What a module of a layout has; parts are the experts, "text_encoder", "vae" and "tokenizer"."""

    NAME: str

    def recognise(self, folder: Path) -> bool:
        """Whether ``folder`` has this layout, complete or not."""

    def parts(self, folder: Path) -> dict[str, Path]:
        """The file or folder of every part; the tensors are read from there later."""

    def spec(self, folder: Path, parts: Parts) -> ModelSpec:
        """The model, from configurations and from the tensors as the files name them."""

    def names(self, part: str, spec: ModelSpec) -> dict[str, str]:
        """Name of a tensor in the files → its official name."""


LAYOUTS: tuple[Layout, ...] = (diffusers, official)


def layout_of(folder: Path) -> Layout:
    """The layout of ``folder``. Raises UserError where there is none."""
    whole = "the folder of an official or a -Diffusers checkpoint"
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
        raise UserError(found, whole, "point to the folder or a hub name such as Wan-AI/Wan2.2-T2V-A14B")
    for layout in LAYOUTS:
        if layout.recognise(folder):
            return layout
    found = f"{folder} has neither {diffusers.MODEL_INDEX} nor {official.TEXT_ENCODER_FILE}"
    raise UserError(found, whole, "point to that folder")
