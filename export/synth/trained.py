"""Trained weights that ship with the package: the tiny model, one safetensors file per part, and its tokenizer.

``studies/tiny_model`` trains them. They are stored in 16 bits (the text encoder in bfloat16 like the release, the rest
in float16), the kernels of the VAE in 8 bits with a scale per output channel. Checkpoints have the release's dtypes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.files.safetensors_file import read_safetensors
from wan22.specs import ModelSpec

TOKENIZER_MODEL = "spiece.model"
SCALE = ".scale"  # the name of what an int8 tensor's rows are multiplied with: its own name and this


def trained_folder(spec: ModelSpec) -> Path | None:
    """The folder with the weights of ``spec``; None if they do not ship with the package."""
    folder = Path(__file__).parent / "trained" / spec.name
    return folder if folder.is_dir() else None


def part_file(folder: Path, part: str) -> Path:
    """The file of an expert, "text_encoder" or "vae"."""
    return folder / f"{part}.safetensors"


def trained_pieces(folder: Path, part: str, name: str) -> Iterator[npt.NDArray[Any]]:
    """The elements of the tensor with the official ``name``, in order."""
    tensors = read_safetensors(part_file(folder, part))
    if name + SCALE not in tensors:
        yield from tensors[name].pieces()
        return
    rows = tensors[name].read().astype(np.float32).reshape(tensors[name].shape[0], -1)
    yield (rows * tensors[name + SCALE].read().astype(np.float32)[:, None]).ravel()


def trained_tokenizer(spec: ModelSpec) -> bytes | None:
    """The ``spiece.model`` of the weights of ``spec``; None if they do not ship with the package."""
    folder = trained_folder(spec)
    return None if folder is None else (folder / TOKENIZER_MODEL).read_bytes()
