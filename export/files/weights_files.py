"""Read a weights file in any format: safetensors, torch's zip or GGUF, recognised by content, not by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.files.decoded import Tensor
from export.files.gguf_reader import MAGIC, read_gguf
from export.files.safetensors_file import read_with_metadata
from export.files.torch_reader import read_torch
from wan22.errors import UserError
from wan22.inputs import check_regular

SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
ZIP = b"PK\x03\x04"
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class WeightsFile:
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def read_weights(path: Path) -> WeightsFile:
    """Every tensor of the file, and its metadata; reads headers only.

    Raises:
        UserError: the file is missing, truncated, damaged or in another format.
    """
    refuse_stand_in(path)
    start = _start(path)
    if start[:4] == MAGIC:
        return WeightsFile(*read_gguf(path))
    if start[:4] == ZIP or path.suffix in SUFFIXES[2:]:
        return WeightsFile(read_torch(path), {})
    return WeightsFile(*read_with_metadata(path))


def refuse_stand_in(path: Path) -> None:
    """Refuse a placeholder for a file that was not downloaded: a Git LFS pointer or a web page."""
    start = _start(path)
    if start.startswith(LFS):
        raise UserError(f"{path} is a Git LFS pointer", "the file itself", "run git lfs pull in that folder")
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan"):
        raise UserError(f"{path} is a web page", "a weights file", "download the file, not the page about it")


def _start(path: Path) -> bytes:
    check_regular(path)
    try:
        with path.open("rb") as stream:
            return stream.read(64)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable file", "check the path") from None
