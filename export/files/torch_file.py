"""``.pth`` files: torch's zip of a pickle and one uncompressed record per tensor, read and written tensor by tensor.

Reading unpickles with torch's restricted unpickler only (``weights_only=True``: no code runs) and onto the meta device,
which yields shapes and the place of every record in the file, and no data. Writing states the format in full, because
``torch.save`` wants the whole model in memory: 11 GB for the real text encoder.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.files.tensor_file import BFLOAT16, HoleyFile, Pieces, Planned, Stored
from wan22.errors import UserError

ALIGNMENT = 64  # of every record, as torch writes them
_LOCAL_HEADER_BYTES, _ZIP64_EXTRA_BYTES = 30, 20


def read_torch(path: Path) -> dict[str, Stored]:
    """Every tensor of a state dict; reads the pickle only.

    Raises:
        UserError: no such file, cut off, no state dict, or a pickle that wants to run code.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing", "the file of the official release", "name its root folder, or download it"
        )
    with path.open("rb") as stream:  # by its path it would be no zip if it may not be read
        is_zip = zipfile.is_zipfile(stream)
    if not is_zip:
        raise UserError(f"{path} is no torch zip", "a whole file written by torch.save", "download it again")
    state = _unpickled(path)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds a {type(state).__name__}", "a state dict", "use the official file")
    return {name: _stored(path, name, tensor) for name, tensor in state.items()}


def _unpickled(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or "forbidden content"
        raise UserError(f"{path}: {reason}", "tensors only, no code", "do not trust this file") from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: {reason}", "a whole file written by torch.save", "download it again") from None


def _stored(path: Path, name: object, tensor: Any) -> Stored:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        raise UserError(f"{path}: entry {name!r} is no plain tensor", "tensors by name", "use the official file")
    dtype = BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
    begin: Any = tensor.untyped_storage()._checkpoint_offset  # set by torch.load for the meta device
    stored = Stored(path, dtype, tuple(tensor.shape), begin + int(tensor.storage_offset()) * dtype.itemsize)
    if stored.offset + stored.size_bytes > path.stat().st_size:
        raise UserError(f"{path} ends within {name}", "the whole file", "download it again")
    return stored


def write_torch(path: Path, tensors: Mapping[str, Planned], pieces: Pieces) -> None:
    """Writes what ``torch.save`` of a state dict writes; ``pieces(name)`` yields the elements, zeros become holes."""
    with HoleyFile(path, "w") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickled(tensors))
        for key, (name, planned) in enumerate(tensors.items()):
            with archive.open(_aligned(f"archive/data/{key}", stream), "w", force_zip64=True) as record:
                for piece in pieces(name):
                    record.write(np.ascontiguousarray(piece, planned.dtype).view(np.uint8).data)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _aligned(name: str, stream: HoleyFile) -> zipfile.ZipInfo:
    """An entry whose header is padded so that the data behind it is aligned."""
    data = stream.tell() + _LOCAL_HEADER_BYTES + len(name) + _ZIP64_EXTRA_BYTES + 4
    padding = -data % ALIGNMENT
    info = zipfile.ZipInfo(name)
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """Pickles as torch pickles a contiguous tensor."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        import torch._utils

        strides = tuple(int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape)))
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, _Storage):
            return None
        kind = torch.BFloat16Storage if obj.dtype == BFLOAT16 else torch.FloatStorage
        return "storage", kind, obj.key, "cpu", obj.elements


def _pickled(tensors: Mapping[str, Planned]) -> bytes:
    state = {
        name: _Tensor(_Storage(str(key), planned.dtype, int(np.prod(planned.shape))), planned.shape)
        for key, (name, planned) in enumerate(tensors.items())
    }
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(state)
    return content.getvalue()
