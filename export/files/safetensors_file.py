"""Read and write safetensors files tensor by tensor: an 8-byte header length, a JSON header, the data.

The safetensors library's errors suggest no remedy, it supports numpy's types only, and it writes whole files from
memory. The format is short enough to implement in full: each check below is one of its rules.
"""

import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import msgspec
import numpy as np

from export.files.tensor_file import BFLOAT16, FLOAT8, HoleyFile, Pieces, Planned, Stored
from wan22.errors import DAMAGED_JSON, UserError
from wan22.inputs import check_regular

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": FLOAT8[0],
    "F8_E5M2": FLOAT8[1],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_MAX_BYTES = 100_000_000  # the format's limit


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of the file; reads the header only.

    Raises:
        UserError: the file is missing, truncated or not safetensors, or its header is inconsistent.
    """
    return read_with_metadata(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The optional free-form strings of the file's header."""
    return read_with_metadata(path)[1]


def read_with_metadata(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Both :func:`read_safetensors` and :func:`read_metadata`."""
    content, start = _header(path)
    try:
        header = msgspec.json.decode(content)
        metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        entries = msgspec.convert(header, dict[str, _Entry])
    except (*DAMAGED_JSON, AttributeError) as error:
        _refuse(path, f"invalid header ({error})")
    tensors = {name: _locate(path, name, entry, start) for name, entry in entries.items()}
    end = max((t.offset + t.size_bytes for t in tensors.values()), default=start)
    if (size := path.stat().st_size) != end:
        _refuse(path, f"{size} bytes", f"the {end} bytes that its header declares")
    in_order = sorted(tensors.values(), key=lambda t: (t.offset, t.size_bytes))
    if any(a.offset + a.size_bytes != b.offset for a, b in itertools.pairwise(in_order)):
        _refuse(path, "tensors that overlap or leave gaps")
    return tensors, metadata


def _header(path: Path) -> tuple[bytes, int]:
    """The JSON text, and the offset of the data."""
    check_regular(path)
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= HEADER_MAX_BYTES:
                _refuse(path, "no safetensors header")
            content = stream.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable safetensors file", "check the path") from None
    if len(content) < length:
        _refuse(path, f"{8 + len(content)} bytes", f"at least the {8 + length} bytes of its header")
    return content, 8 + length


def _locate(path: Path, name: str, entry: _Entry, start: int) -> Stored:
    if entry.dtype not in DTYPES:
        _refuse(path, f"{name} has type {entry.dtype}", f"one of {', '.join(DTYPES)}")
    begin, end = entry.data_offsets
    stored = Stored(path, DTYPES[entry.dtype], entry.shape, start + begin)
    if min(entry.shape, default=0) < 0 or begin < 0 or end - begin != stored.size_bytes:
        found = f"{name} {entry.dtype}{list(entry.shape)} in bytes {begin} to {end}"
        _refuse(path, found, "offsets that fit its shape")
    return stored


def _refuse(path: Path, found: str, expected: str = "a complete safetensors file") -> NoReturn:
    raise UserError(f"{path}: {found}", expected, "download or copy the file again")


def write_safetensors(
    path: Path, tensors: Mapping[str, Planned], pieces: Pieces, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` in the given order; ``pieces(name)`` yields the elements, blocks of zeros become holes."""
    with HoleyFile(path, "w") as stream:
        stream.write(header_bytes(tensors, metadata))
        for name, planned in tensors.items():
            for piece in pieces(name):
                stream.write(np.ascontiguousarray(piece, planned.dtype).view(np.uint8))


def header_bytes(
    tensors: Mapping[str, Planned], metadata: Mapping[str, str] | None = None, alignment_bytes: int = 8
) -> bytes:
    """The header, padded so that the data starts at a multiple of ``alignment_bytes``."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, planned in tensors.items():
        ends = (offset, offset := offset + planned.size_bytes)
        header[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": ends}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(len(content) + 8) % alignment_bytes)
    return struct.pack("<Q", len(content)) + content
