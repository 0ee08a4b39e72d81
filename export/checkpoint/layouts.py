"""The supported layouts of Wan2.2 checkpoints: one module each, with the same four functions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from export.checkpoint import diffusers, official, single_files
from export.checkpoint.describe import describe
from export.checkpoint.place import listing
from export.checkpoint.spec import Parts
from wan22.bundle import MANIFEST
from wan22.errors import UserError
from wan22.specs import ModelSpec


class Layout(Protocol):
    """The interface of a layout's module; parts are the experts, "text_encoder", "vae" and "tokenizer"."""

    NAME: str

    def recognise(self, names: Iterable[str]) -> bool:
        """True if a folder with files of these relative ``names`` has this layout, complete or not."""

    def parts(self, folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
        """The file or folder of every part except those ``given``."""

    def spec(self, folder: Path, parts: Parts) -> ModelSpec:
        """The model, from configurations and from the tensors under their names in the files."""

    def names(self, part: str, spec: ModelSpec) -> dict[str, str]:
        """Names in the files → official names."""


LAYOUTS: tuple[Layout, ...] = (diffusers, official, single_files)


def layout_named(names: Iterable[str]) -> Layout | None:
    """The layout of a local folder or hub repository with files of these names."""
    names = frozenset(names)
    return next((layout for layout in LAYOUTS if layout.recognise(names)), None)


def layout_of(folder: Path) -> Layout:
    """The layout of ``folder``. Raises UserError if it has none."""
    whole = "the folder of an official or a -Diffusers checkpoint"
    if folder.is_file():
        options = " ".join(single_files.OPTIONS.values())
        raise UserError(f"{folder} is a file: {_described(folder)}", whole, f"name it by its part: {options}")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist", whole, f"point to the folder or a hub name such as {EXAMPLE}")
    names = listing(folder)
    if MANIFEST in names:
        raise UserError(f"{folder} is a bundle made by wan-trt", whole, "name the checkpoint that it was exported from")
    if layout := layout_named(names):
        return layout
    found = f"{folder} has neither {diffusers.MODEL_INDEX} nor {official.TEXT_ENCODER_FILE}"
    raise UserError(found, whole, "point to that folder")


def _described(path: Path) -> str:
    try:
        return describe(path).text
    except UserError as error:
        return str(error).partition(" | ")[0]


EXAMPLE = "Wan-AI/Wan2.2-T2V-A14B"
