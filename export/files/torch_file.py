"""Write ``.pth`` files tensor by tensor: torch's zip of a pickle and one uncompressed record per tensor.

``torch.save`` needs the whole model in memory, 11 GB for the real text encoder, so the format is implemented here.
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

from export.files.tensor_file import BFLOAT16, HoleyFile, Pieces, Planned

ALIGNMENT = 64  # bytes, for every record, same as torch
_LOCAL_HEADER_BYTES, _ZIP64_EXTRA_BYTES = 30, 20


def write_torch(path: Path, tensors: Mapping[str, Planned], pieces: Pieces) -> None:
    """Write a state dict like ``torch.save``; ``pieces(name)`` yields the elements, zeros become holes."""
    with HoleyFile(path, "w") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickle(tensors))
        for key, (name, planned) in enumerate(tensors.items()):
            with archive.open(_aligned_entry(f"archive/data/{key}", stream), "w", force_zip64=True) as record:
                for piece in pieces(name):
                    record.write(np.ascontiguousarray(piece, planned.dtype).view(np.uint8).data)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _aligned_entry(name: str, stream: HoleyFile) -> zipfile.ZipInfo:
    """An entry whose header is padded so that its data is aligned."""
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
    """Pickles like a contiguous torch tensor."""

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


def _pickle(tensors: Mapping[str, Planned]) -> bytes:
    state = {
        name: _Tensor(_Storage(str(key), planned.dtype, int(np.prod(planned.shape))), planned.shape)
        for key, (name, planned) in enumerate(tensors.items())
    }
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(state)
    return content.getvalue()
