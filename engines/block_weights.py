"""The weights of a component in stages: one file, in which every block is one region with the same offsets.

A runtime streams blocks: it copies one region and binds all weights of a block as base plus offset. Matrices stay as
the bundle stores them, [out, in]. The weights that are used once per prompt, for the text's keys and values, are last
in a region, so that a step does not read them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from engines.cpu.nvfp4 import GROUP, values_of
from wan22.block_layout import (
    LORA_DOWN,
    LORA_UP,
    LOW_RANK_DOWN,
    LOW_RANK_UP,
    BlockLayout,
    Place,
    parts_of,
    size_bytes,
    varies,
)
from wan22.bundle import MANIFEST
from wan22.component import File, Stage, Tensor
from wan22.errors import UserError
from wan22.progress import Progress

ALIGNMENT_BYTES, PAGE_BYTES = 256, 4096  # of CUDA's allocations, and of disks
READ_AT_ONCE_BYTES = 2**24
HASHED_BESIDE_BYTES = 2**20
STEP_STAGES, PROMPT_STAGES = ("qkv", "attend", "rest", "layer"), ("text_kv",)
SCALES = ("self_attn.q_scale", "self_attn.k_scale")  # constants of the engines, valid for all blocks and experts
V_NORMS = "self_attn.v_norms"  # of the rows of V's matrix: they bound V
BLOCK = "blocks.{}.self_attn."
FLOAT4 = ir.DataType.FLOAT4E2M1.numpy()


@dataclass(frozen=True)
class StoredTensor:
    location: str  # relative to the ONNX bundle
    offset: int
    size_bytes: int
    dtype: np.dtype[np.generic]


Stored = Mapping[str, StoredTensor]  # the tensors of a whole transformer under their official names


def stored_tensors(graph: Path) -> dict[str, StoredTensor]:
    """The weights of the whole graph at ``graph``."""
    found = {}
    for name, value in ir.load(graph).graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            place = str(tensor.location), tensor.offset or 0, tensor.length or tensor.nbytes
            found[name] = StoredTensor(*place, tensor.dtype.numpy())
    return found


def attention_scales(graphs: Sequence[Path]) -> dict[str, float]:
    """The largest scale of Q and of K in the self-attention of any block of the whole ``graphs``; none without FP8."""
    found: dict[str, float] = {}
    for graph in graphs:
        for name, tensor in stored_tensors(graph).items():
            if (short := re.sub(r"^blocks\.\d+\.", "", name)) in SCALES:
                scale = np.fromfile(graph.parent / tensor.location, np.float32, 1, offset=tensor.offset)
                found[short] = max(found.get(short, 0.0), float(scale[0]))
    return found


def layout_of(stages: Sequence[Stage], blocks: int, beside: Iterable[Tensor] = ()) -> BlockLayout:
    """The layout of the weights of ``stages``, so many blocks, and those ``beside`` that no stage reads."""
    groups: dict[str, dict[str, Tensor]] = {"ends": {t.name: t for t in beside}, "step": {}, "prompt": {}}
    for stage in stages:
        group = "step" if stage.name in STEP_STAGES else "prompt" if stage.name in PROMPT_STAGES else "ends"
        groups[group] |= {tensor.name: tensor for tensor in stage.weights if tensor.name not in SCALES}
    for tensor in (tensor for stage in stages for tensor in stage.inputs if tensor.name == "v_scale"):
        groups["step"][V_NORMS] = Tensor(V_NORMS, "float32", tensor.dims)
    ranks = {lora_rank(tensor) for group in groups.values() for tensor in group.values()} - {0}
    ordered = {name: list(group.values()) for name, group in groups.items()}
    if ranks:  # what a LoRA replaces stands together: last in a step, first for a prompt
        ordered["step"].sort(key=_varies)
        ordered["prompt"].sort(key=_varies, reverse=True)
    ends, end = _places(ordered["ends"], 0)
    step, step_bytes = _places(ordered["step"], 0)
    prompt, size = _places(ordered["prompt"], step_bytes)
    first, stride = round_up(end, PAGE_BYTES), round_up(size, PAGE_BYTES)
    return BlockLayout(ends, step + prompt, blocks, first, stride, step_bytes, max(ranks, default=0))


def lora_rank(tensor: Tensor) -> int:
    """The rank of a slot that is ``tensor``; 0 if it is none."""
    linear, _, leaf = tensor.name.rpartition(".")
    return int(tensor.dims[0]) // len(parts_of(linear)) if leaf == LORA_DOWN else 0


def _varies(tensor: Tensor) -> bool:
    return varies(tensor.name, tuple(map(int, tensor.dims)))


def _places(tensors: Iterable[Tensor], start: int) -> tuple[tuple[Place, ...], int]:
    """The places of ``tensors`` from offset ``start`` on, and the end of the last."""
    places, end = [], start
    for tensor in tensors:
        places.append(Place(tensor.name, end, size_bytes(tensor), tuple(map(int, tensor.dims))))
        end = round_up(end + places[-1].size_bytes, ALIGNMENT_BYTES)
    return tuple(places), end


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def write_block_weights(graph: Path, layout: BlockLayout, path: Path, progress: Progress) -> File:
    """Copy the weights of the whole ``graph`` to ``path`` in the order of ``layout``.

    Raises:
        UserError: the graph has weights of more or fewer blocks, or they are cut short.
    """
    stored, folder = stored_tensors(graph), graph.parent
    blocks = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
    if blocks != set(map(str, range(min(layout.blocks, len(blocks) + 1)))):
        raise UserError(f"{graph} with {len(blocks)} blocks", f"{layout.blocks} by {MANIFEST}", "export again")
    with path.open("wb") as stream, ThreadPoolExecutor(1, "hash") as pool:
        file = _HashedFile(stream, pool)
        for place in layout.ends:
            _copy(_find(stored, place.name, None), folder, file, place.offset)
        for block in range(layout.blocks):
            start = layout.first_block + block * layout.block_bytes
            for place in layout.block:
                if place.name.endswith((LORA_DOWN, LORA_UP)):
                    continue  # empty: zeros
                if place.name == V_NORMS:
                    file.write(_v_norms(stored, folder, block, place.shape[1]).tobytes(), start + place.offset)
                else:
                    _copy(_find(stored, place.name, block), folder, file, start + place.offset)
            progress(f"write {path.name}", block + 1, layout.blocks, "blocks")
        return File(path.name, file.finish(layout.size_bytes), layout.size_bytes)


class _HashedFile:
    """A file written in the order of its offsets and hashed meanwhile. Zeros stay holes, as in sparse test models."""

    def __init__(self, stream: IO[bytes], pool: ThreadPoolExecutor) -> None:
        self._stream, self._pool, self._digest, self._end = stream, pool, hashlib.sha256(), 0
        self._hashing: Future[None] | None = None

    def write(self, piece: bytes, offset: int) -> None:
        self._skip_to(offset)
        self._hash(piece)
        if np.frombuffer(piece, np.uint8).any():
            self._stream.seek(offset)
            self._stream.write(piece)
        self._end += len(piece)

    def finish(self, size_bytes: int) -> str:
        """The hash of the file, filled up with zeros to ``size_bytes``."""
        self._skip_to(size_bytes)
        self._stream.truncate(size_bytes)
        self._hash(b"")
        return self._digest.hexdigest()

    def _hash(self, piece: bytes) -> None:
        """Add ``piece`` to the hash, a long one beside the next read and write."""
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._pool.submit(self._digest.update, piece) if len(piece) > HASHED_BESIDE_BYTES else None
        if self._hashing is None:
            self._digest.update(piece)

    def _skip_to(self, offset: int) -> None:
        assert offset >= self._end
        self._hash(bytes(offset - self._end))
        self._end = offset


def _find(stored: Stored, name: str, block: int | None) -> list[StoredTensor]:
    """The tensor ``name`` of a block, or the parts that it joins: q, k and v for ``self_attn.qkv.weight``."""
    prefix = "" if block is None else f"blocks.{block}."
    if prefix + name in stored:
        return [stored[prefix + name]]
    module, parts, leaf = name.rsplit(".", 2)
    return [stored[f"{prefix}{module}.{part}.{leaf}"] for part in parts]


def _copy(sources: Sequence[StoredTensor], folder: Path, file: _HashedFile, offset: int) -> None:
    for source in sources:
        with (folder / source.location).open("rb") as stream:
            stream.seek(source.offset)
            left = source.size_bytes
            while left:
                piece = stream.read(min(left, READ_AT_ONCE_BYTES))
                if not piece:
                    raise UserError(f"{folder / source.location} is cut short", "all its tensors", "export again")
                file.write(piece, offset)
                offset, left = offset + len(piece), left - len(piece)


def _v_norms(stored: Stored, folder: Path, block: int, width: int) -> np.ndarray:
    """The Euclidean norms of the rows of V's matrix, float32 ``[D]``, without the factors of its columns."""

    def read(leaf: str, start: int, count: int) -> np.ndarray | None:
        tensor = stored.get(f"{BLOCK.format(block)}{leaf}")
        if tensor is None:
            return None
        if tensor.dtype == FLOAT4:  # two numbers a byte
            packed = np.fromfile(folder / tensor.location, np.uint8, count // 2, offset=tensor.offset + start // 2)
            return values_of(packed)
        at = tensor.offset + start * tensor.dtype.itemsize
        return np.fromfile(folder / tensor.location, tensor.dtype, count, offset=at)

    codes, scales = read("qkv.weight", 2 * width * width, width * width), read("qkv.weight_scale", 2 * width, width)
    assert codes is not None and scales is not None
    factors = read("q.input_factor", 0, width)
    divisors = np.float32(1.0) if factors is None else factors
    groups = read("qkv.group_scale", 2 * width * width // GROUP, width * width // GROUP)
    if groups is not None:
        codes = codes.reshape(-1, GROUP) * groups.astype(np.float32)[:, None]
    rows = np.array_split(codes.reshape(width, width), 16)
    if (branch := stored.get(f"{BLOCK.format(block)}qkv.{LOW_RANK_DOWN}")) is not None:
        rank = branch.size_bytes // branch.dtype.itemsize // width
        down = read(f"qkv.{LOW_RANK_DOWN}", 0, rank * width)
        up = read(f"qkv.{LOW_RANK_UP}", 2 * width * rank, width * rank)
        assert down is not None and up is not None
        down, ups = down.astype(np.float32).reshape(rank, width), np.array_split(up.reshape(width, rank), 16)
        rows = [part + each.astype(np.float32) @ down for part, each in zip(rows, ups, strict=True)]
    norms: np.ndarray = np.concatenate([np.linalg.norm(part.astype(np.float32) * divisors, axis=1) for part in rows])
    return np.asarray(norms * scales, np.float32)
