"""Read ``.pth`` and ``.pt`` files tensor by tensor: torch's zip of a pickle and one uncompressed record per storage.

The pickle is read without PyTorch. Its opcodes are checked first; then Python's unpickler loads it and may call only
the few names that describe tensors, which this module implements. So the file cannot run code, nothing larger than the
file is allocated, and a tensor is refused unless its record contains all of it.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.files.tensor_file import BFLOAT16, FLOAT8, Stored
from wan22.errors import UserError
from wan22.inputs import check_regular

NUMPY = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in NUMPY}  # by torch's name
DTYPES |= {"bfloat16": BFLOAT16, "float8_e4m3fn": FLOAT8[0], "float8_e5m2": FLOAT8[1]}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
WRAPPERS = ("generator_ema", "ema", "state_dict", "model_state_dict", "model", "module", "generator")
UNREADABLE = (ValueError, TypeError, AttributeError, EOFError, LookupError, OverflowError, struct.error)
PICKLE_MAX_BYTES = 2**26
AGAIN = "download it again"
WHOLE = "a complete file written by torch.save"


def read_torch(path: Path) -> dict[str, Stored]:
    """Every tensor of a state dict, which may be nested in a trainer's dictionary; reads the pickle only.

    Raises:
        UserError: the file is missing, truncated, big-endian, compressed or not a state dict, or would run code.
    """
    state, records = _read(path)
    state = _unwrap(state)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds a {type(state).__name__}", "a state dict", "use the official file")
    return {name: _locate(path, name, tensor, records) for name, tensor in state.items()}


def read_tensor(path: Path) -> Stored:
    """The only tensor of a ``torch.save`` file, alone or in a dictionary. Raises like :func:`read_torch`."""
    state, records = _read(path)
    tensors = [each for each in (state.values() if isinstance(state, dict) else [state]) if isinstance(each, _Tensor)]
    if len(tensors) != 1:
        raise UserError(f"{path} holds {len(tensors)} tensors", "one tensor", "save it alone with torch.save")
    return _locate(path, "the tensor", tensors[0], records)


def _read(path: Path) -> tuple[Any, dict[str, "_Record"]]:
    """The unpickled content, and the location of every storage's data."""
    if not path.exists():
        raise UserError(f"{path} is missing", "the file of the official release", "give its root folder or download it")
    check_regular(path)
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            content, records = _read_archive(path, archive, stream)
    except PermissionError:
        raise
    except (OSError, RuntimeError, zipfile.BadZipFile, EOFError, struct.error, ValueError) as error:
        raise UserError(f"{path} is not a torch zip ({error})", WHOLE, AGAIN) from None
    return _unpickle(path, content), records


@dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    size_bytes: int


def _read_archive(path: Path, archive: zipfile.ZipFile, stream: io.BufferedReader) -> tuple[bytes, dict[str, _Record]]:
    """The pickle, and the location of every storage's data."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{path} has compressed or encrypted records", WHOLE, "save it again with torch.save")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_MAX_BYTES:
        found = "TorchScript or not written by torch" if not pickles else "more than one pickle, or too large a pickle"
        raise UserError(f"{path}: {found}", WHOLE, "use a state dict written by torch.save")
    root = pickles[0].filename.removesuffix("data.pkl")
    order = next((archive.read(entry) for entry in entries if entry.filename == f"{root}byteorder"), b"little")
    if order != b"little":
        raise UserError(f"{path} is {order.decode(errors='replace')[:20]}-endian", "little-endian", "save it on a PC")
    data = f"{root}data/"
    records = {e.filename.removeprefix(data): _record(stream, e) for e in entries if e.filename.startswith(data)}
    return archive.read(pickles[0]), records


def _record(stream: io.BufferedReader, entry: zipfile.ZipInfo) -> _Record:
    """The location of an entry's data. The entry's header precedes it; only that header contains its length."""
    stream.seek(entry.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", stream.read(30))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header for {entry.filename}")
    return _Record(entry.header_offset + 30 + name + extra, entry.file_size)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """Both of torch's forms; the longer one, for newer types, ends with dtype and metadata."""
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    dtype = next((each.name for each in rest if isinstance(each, _Dtype)), storage.dtype)
    return _Tensor(storage, int(first), tuple(map(int, shape)), tuple(map(int, strides)), dtype)


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts only names that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Dtype(STORAGES[name])
        if module == "torch" and name in {"float8_e4m3fn", "float8_e5m2", *DTYPES}:
            return _Dtype(name)
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        owner = "a torchao tensor" if module.startswith("torchao") else "an unsupported torch type"
        what = f"{owner} " if module.startswith("torch") else ""
        raise pickle.UnpicklingError(f"{what}{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, _Dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"a reference to {str(pid)[:40]}")
        return _Storage(key, dtype.name)


def _unpickle(path: Path, content: bytes) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
                raise pickle.UnpicklingError(f"a memo of {argument} entries")
        return _Unpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {error}", "tensors only, no code", "do not trust this file") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: {str(error).partition(chr(10))[0]}", WHOLE, AGAIN) from None


def _unwrap(state: Any) -> Any:
    """The state dict inside a trainer's dictionary, such as ``{"generator_ema": {...}, "step": 3}``."""
    if isinstance(state, dict) and not any(isinstance(value, _Tensor) for value in state.values()):
        for name in WRAPPERS:
            if isinstance(inner := state.get(name), dict):
                return _unwrap(inner)
    return state


def _locate(path: Path, name: object, tensor: Any, records: Mapping[str, _Record]) -> Stored:
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
        raise UserError(f"{path}: entry {name!r} is not a plain tensor", "tensors by name", "use the official file")
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"{path}: {name} is {tensor.dtype}", ", ".join(DTYPES), "use a file with these types")
    strides = tuple(int(np.prod(tensor.shape[axis + 1 :], dtype=object)) for axis in range(len(tensor.shape)))
    sized = [
        (ours, theirs) for ours, theirs, size in zip(strides, tensor.strides, tensor.shape, strict=False) if size > 1
    ]
    if len(tensor.strides) != len(tensor.shape) or any(ours != theirs for ours, theirs in sized):
        raise UserError(f"{path}: entry {name!r} is not a plain tensor", "contiguous tensors", "use the official file")
    record = records.get(tensor.storage.key)
    if record is None:
        raise UserError(f"{path} has no record {tensor.storage.key} for {name}", "the complete file", AGAIN)
    begin = tensor.first * dtype.itemsize
    stored = Stored(path, dtype, tensor.shape, record.offset + begin)
    negative = min((tensor.first, *tensor.shape), default=0) < 0
    end = record.offset + record.size_bytes
    if negative or begin + stored.size_bytes > record.size_bytes or end > path.stat().st_size:
        raise UserError(f"{path} ends within {name}", "the complete file", AGAIN)
    return stored
