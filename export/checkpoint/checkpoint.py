"""A Wan2.2 checkpoint of any layout, opened for reading tensor by tensor under its official names.

Everything that can be wrong is found here, before any work: missing folders, files and shards, files cut off, tensors
unknown, missing or of another shape than the model's (wan22.md §1). Only headers are read, so that takes a second for
126 GB. What the configs do not say (official text encoder and VAE) is read off the tensors' shapes.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.checkpoint.hub import downloaded, is_hub_name
from export.checkpoint.layouts import layout_of
from export.checkpoint.part_files import read_part
from export.checkpoint.schema import Shapes, part_tensors
from export.checkpoint.spec import Parts
from export.files.tensor_file import BFLOAT16, Array, Stored
from wan22.bundle import Source
from wan22.errors import UserError, some_of
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec

READABLE = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
NAMES_SHOWN = 3


class Weights(Protocol):
    """Tensors by official name. ``read`` gives one in its own dtype, ``pieces`` its elements a few at a time,
    ``stored`` the place in a file where it lies just so, if it does.
    """

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype[Any]: ...
    def read(self, name: str) -> npt.NDArray[Any]: ...
    def pieces(self, name: str) -> Iterable[Array]: ...
    def stored(self, name: str) -> Stored | None: ...


@dataclass(frozen=True)
class FileWeights:
    """``Weights`` that lie in files, in the order of the tensor table."""

    tensors: Mapping[str, Stored]

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def read(self, name: str) -> npt.NDArray[Any]:
        return self.tensors[name].read()

    def pieces(self, name: str) -> Iterable[Array]:
        return self.tensors[name].pieces()

    def stored(self, name: str) -> Stored | None:
        return self.tensors[name]


@dataclass(frozen=True)
class Checkpoint:
    """``weights`` has one entry per expert of ``spec``, "text_encoder" and "vae"; ``tokenizer`` is a folder."""

    folder: Path
    source: Source
    spec: ModelSpec
    weights: Mapping[str, Weights]
    tokenizer: Path


def open_checkpoint(where: str | Path, progress: Progress = silent) -> Checkpoint:
    """Opens a folder of any layout, or downloads a hub repository such as ``Wan-AI/Wan2.2-T2V-A14B``.

    Raises:
        UserError: no such place, no checkpoint of Wan2.2, or one that is damaged, incomplete or of unknown structure.
    """
    folder = downloaded(str(where)) if is_hub_name(where) else Path(where)
    layout = layout_of(folder)
    places = layout.parts(folder)
    tokenizer = places.pop("tokenizer")
    raw = _read(places, progress)
    spec = layout.spec(folder, raw)
    _check_tokenizer(tokenizer)
    named = {part: _renamed(tensors, layout.names(part, spec)) for part, tensors in raw.items()}
    parts = {part: _checked(part, spec, tensors) for part, tensors in named.items()}
    source = Source(str(where), layout.NAME, _fingerprint(folder, parts))
    return Checkpoint(folder, source, spec, {part: FileWeights(tensors) for part, tensors in parts.items()}, tokenizer)


def _check_tokenizer(folder: Path) -> None:
    import tokenizers

    vocabulary, expected, remedy = folder / "tokenizer.json", "the tokenizer of umt5", "download that folder again"
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} is missing", expected, remedy)
    try:
        tokenizers.Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{vocabulary}: {error}", expected, remedy) from None


def _read(places: Mapping[str, Path], progress: Progress) -> Parts:
    raw: dict[str, Mapping[str, Stored]] = {}
    for done, (part, place) in enumerate(places.items(), 1):
        raw[part] = read_part(place, part)
        _refuse_repacked(part, raw[part])
        progress("open checkpoint", done, len(places), "parts")
    return raw


def _renamed(tensors: Mapping[str, Stored], names: Mapping[str, str]) -> dict[str, Stored]:
    """Official names for those of the files; what has none keeps its own, and is refused later."""
    return {names.get(name, name): stored for name, stored in tensors.items()}


def _refuse_repacked(part: str, tensors: Mapping[str, Stored]) -> None:
    """Single-file repacks carry scales or prefixes that mean something; reading past them would give garbage."""
    remedy = "use the official or the -Diffusers checkpoint"
    for name, stored in tensors.items():
        if re.search(r"(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8)$", name):
            raise UserError(f"{part}: {name}, a scaled FP8 repack", "unscaled weights", remedy)
        if name.startswith(("model.diffusion_model.", "diffusion_model.")):
            raise UserError(f"{part}: {name}, a repack for ComfyUI", "names without that prefix", remedy)
        if stored.dtype not in READABLE:
            raise UserError(f"{part}: {name} is {stored.dtype}", "float32, bfloat16 or float16", remedy)


def _checked(part: str, spec: ModelSpec, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a part in the order of the table, having the names and shapes of the table."""
    expected: Shapes = part_tensors(part, spec)
    model, remedy = f"the {len(expected)} tensors of {spec.name}", "use a Wan2.2 checkpoint, or download it again"
    unknown = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    found = [
        f"{len(names)} {kind}: {some_of(names, NAMES_SHOWN)}"
        for kind, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if found:
        raise UserError(f"{part}: {'; '.join(found)}", model, remedy)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{part}: {name} has shape {list(tensors[name].shape)}", f"{list(shape)}", remedy)
    _refuse_mixed_types(part, tensors)
    return {name: tensors[name] for name in expected}


def _refuse_mixed_types(part: str, tensors: Mapping[str, Stored]) -> None:
    """Releases keep some vectors and embeddings in float32, but all matrices of the blocks are of one type."""
    first: tuple[str, Stored] | None = None
    for name, stored in tensors.items():
        if not name.startswith("blocks.") or len(stored.shape) != 2 or "embedding" in name:
            continue
        first = first or (name, stored)
        if stored.dtype != first[1].dtype:
            found = f"{part}: {name} is {stored.dtype} in {stored.path.name}, {first[0]} {first[1].dtype}"
            raise UserError(found, "one type, not shards of two downloads", "download that shard again")


def _fingerprint(folder: Path, parts: Parts) -> str:
    """Sha256 over names, dtypes and shapes of all tensors and the sizes of all files: cheap, reads no data."""
    lines = [
        f"{part}/{name} {stored.dtype} {list(stored.shape)}"
        for part, tensors in parts.items()
        for name, stored in tensors.items()
    ]
    files = {stored.path for tensors in parts.values() for stored in tensors.values()}
    lines += [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
