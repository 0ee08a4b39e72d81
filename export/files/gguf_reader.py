"""Read GGUF files tensor by tensor: ggml's container of typed metadata, tensors and blocks of quantised values.

The header is parsed here and every length checked against the file's size, because a header may claim anything. The
``gguf`` package decodes the blocks. ``comfy.gguf.orig_shape.NAME``, written by ComfyUI's tools, overrides a shape.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from export.files.decoded import GgufBlocks, Tensor
from export.files.tensor_file import BFLOAT16, Stored
from wan22.errors import UserError
from wan22.inputs import check_regular

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: BFLOAT16,
}
HEAD_MAX_BYTES = 2**26  # a tokenizer of 256,000 pieces takes about 8 MB
ENTRIES_MAX = 100_000  # tensors, and metadata entries; arrays are limited by the file's size
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def read_gguf(path: Path, whole: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of the file, and its metadata; long arrays are replaced by their length, except under ``whole``.

    ``whole`` is the beginning of keys, such as "tokenizer."; numbers are then an array, strings a list.

    Raises:
        UserError: the file is missing, truncated, of another version, or has blocks of an unsupported type.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            head = _Head(stream.read(HEAD_MAX_BYTES), path.stat().st_size, whole)
        return _parse(path, head)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable GGUF file", "check the path") from None
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: {error}", "a complete GGUF file", "download it again") from None


@dataclass
class _Head:
    content: bytes
    file_bytes: int
    whole: str | None
    place: int = 0

    def take(self, form: str) -> Any:
        found = struct.unpack_from(f"<{form}", self.content, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found[0]

    def skip(self, size_bytes: int) -> int:
        """Pass over ``size_bytes``; returns where they begin."""
        start = self.place
        if start + size_bytes > len(self.content):
            raise ValueError("a string or array longer than the header")
        self.place += size_bytes
        return start

    def text(self) -> str:
        start = self.skip(self.take("Q"))
        return self.content[start : self.place].decode()

    def value(self, key: str) -> Any:
        kind = self.take("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind]) if kind in SCALARS else self._unknown(kind)
        kind, count = self.take("I"), self.take("Q")
        if count > len(self.content):
            raise ValueError(f"an array of {count} entries")
        whole = self.whole is not None and key.startswith(self.whole)
        if kind == STRING and whole:
            return [self.text() for _ in range(count)]
        if kind == STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
            return count
        if kind not in SCALARS:
            self._unknown(kind)
        place = self.skip(count * struct.calcsize(SCALARS[kind]))
        if whole:
            return np.frombuffer(self.content, f"<{SCALARS[kind]}", count, place)
        return struct.unpack_from(f"<{count}{SCALARS[kind]}", self.content, place) if count <= 16 else count

    def _unknown(self, kind: int) -> None:
        raise ValueError(f"metadata of type {kind}")


def _parse(path: Path, head: _Head) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if head.content[:4] != MAGIC:
        raise ValueError("not a GGUF file")
    head.place = 4
    version, tensors, entries = head.take("I"), head.take("Q"), head.take("Q")
    if version not in (2, 3) or max(tensors, entries) > ENTRIES_MAX:
        raise ValueError(f"version {version} with {tensors} tensors and {entries} entries")
    metadata = {}
    for _ in range(entries):
        key = head.text()
        metadata[key] = head.value(key)
    infos = []
    for _ in range(tensors):
        name, dims = head.text(), head.take("I")
        if dims > 8:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = tuple(head.take("Q") for _ in range(dims))[::-1]
        infos.append((name, shape, head.take("I"), head.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"alignment {alignment}")
    start = -(-head.place // alignment) * alignment
    found = {name: _tensor(path, head, metadata, (name, shape, kind, start + at)) for name, shape, kind, at in infos}
    if len(found) < len(infos):
        raise ValueError("two tensors with the same name")
    return found, metadata


def _tensor(
    path: Path, head: _Head, metadata: Mapping[str, Any], info: tuple[str, tuple[int, ...], int, int]
) -> Tensor:
    name, shape, kind, offset = info
    original = metadata.get(f"{ORIGINAL_SHAPE}{name}")
    if isinstance(original, tuple):
        if prod(original) != prod(shape):
            raise ValueError(f"{name} has {list(shape)} elements for the shape {list(original)}")
        shape = tuple(map(int, original))
    if kind in PLAIN:
        stored: Tensor = Stored(path, PLAIN[kind], shape, offset)
        size_bytes = stored.size_bytes
    else:
        stored = _blocks(path, name, shape, (kind, offset))
        size_bytes = stored.weight.size_bytes
    if offset + size_bytes > head.file_bytes:
        raise ValueError(f"truncated: {head.file_bytes} bytes end within {name}")
    return stored


def _blocks(path: Path, name: str, shape: tuple[int, ...], place: tuple[int, int]) -> GgufBlocks:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ModuleNotFoundError:
        raise UserError(f"{path} has quantised GGUF blocks", "the gguf package", "pip install gguf") from None
    kind, offset = place
    named = f"number {kind}"
    try:
        named = GGMLQuantizationType(kind).name
        values, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(np.zeros((1, size_bytes), np.uint8), GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        known = "Q8_0, Q6_K, Q5_K, Q4_K or another that gguf-py reads"
        raise UserError(f"{path}: {name} has GGUF type {named}", known, "use another quantisation") from None
    if not shape or shape[-1] % values:
        raise ValueError(f"{name} {list(shape)} is not divisible into blocks of {values}")
    rows = prod(shape[:-1])
    bytes_each = shape[-1] // values * size_bytes
    return GgufBlocks(Stored(path, np.dtype(np.uint8), (rows, bytes_each), offset), kind, shape)
