"""A Wan2.2 checkpoint of either layout, opened for reading tensor by tensor under its official names.

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
from export.checkpoint.keys import diffusers_names
from export.checkpoint.layout import MODEL_INDEX, TEXT_ENCODER_FILE, Layout, expert_folder, tokenizer_folder
from export.checkpoint.part_files import read_part
from export.checkpoint.schema import Shapes, part_tensors
from export.checkpoint.spec import diffusers_spec, official_spec
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
    """Opens a folder of either layout, or downloads a hub repository such as ``Wan-AI/Wan2.2-T2V-A14B``.

    Raises:
        UserError: no such place, no checkpoint of Wan2.2, or one that is damaged, incomplete or of unknown structure.
    """
    folder = downloaded(str(where)) if is_hub_name(where) else Path(where)
    layout = _layout(folder)
    raw, spec = (_official if layout == "official" else _diffusers)(folder, progress)
    tokenizer = _tokenizer(folder, layout)
    parts = {part: _checked(part, spec, tensors) for part, tensors in raw.items()}
    source = Source(str(where), layout, _fingerprint(folder, parts))
    return Checkpoint(folder, source, spec, {part: FileWeights(tensors) for part, tensors in parts.items()}, tokenizer)


Parts = dict[str, dict[str, Stored]]


def _layout(folder: Path) -> Layout:
    whole = "the folder of an official or a -Diffusers checkpoint"
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
        raise UserError(found, whole, "point to the folder or a hub name such as Wan-AI/Wan2.2-T2V-A14B")
    if (folder / MODEL_INDEX).exists():
        return "diffusers"
    marks = (TEXT_ENCODER_FILE, "high_noise_model", "low_noise_model", "config.json")
    if any((folder / mark).exists() for mark in marks):
        return "official"
    raise UserError(f"{folder} has neither {MODEL_INDEX} nor {TEXT_ENCODER_FILE}", whole, "point to that folder")


def _tokenizer(folder: Path, layout: Layout) -> Path:
    import tokenizers

    vocabulary = folder / tokenizer_folder(layout) / "tokenizer.json"
    expected, remedy = "the tokenizer of umt5", "download that folder again"
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} is missing", expected, remedy)
    try:
        tokenizers.Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{vocabulary}: {error}", expected, remedy) from None
    return vocabulary.parent


def _official(folder: Path, progress: Progress) -> tuple[Parts, ModelSpec]:
    two = any((folder / expert_folder(expert, "official")).exists() for expert in ("high_noise", "low_noise"))
    experts = ("high_noise", "low_noise") if two else ("dit",)
    raw = _read(folder, (*experts, "text_encoder", "vae"), "official", progress)
    return raw, official_spec(folder, experts, raw)


def _diffusers(folder: Path, progress: Progress) -> tuple[Parts, ModelSpec]:
    spec = diffusers_spec(folder)
    raw = _read(folder, (*spec.experts, "text_encoder", "vae"), "diffusers", progress)
    raw["text_encoder"] = _without_alias(raw["text_encoder"])
    return {part: _renamed(tensors, diffusers_names(part, spec)) for part, tensors in raw.items()}, spec


def _read(folder: Path, parts: Iterable[str], layout: Layout, progress: Progress) -> Parts:
    raw: Parts = {}
    for done, part in enumerate(names := list(parts), 1):
        raw[part] = read_part(folder, part, layout)
        _refuse_repacked(part, raw[part])
        progress("open checkpoint", done, len(names), "parts")
    return raw


def _without_alias(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The embedding once: transformers may save it under either of its two names, or under both."""
    alias, name = "encoder.embed_tokens.weight", "shared.weight"
    if alias not in tensors:
        return tensors
    rest = {key: stored for key, stored in tensors.items() if key != alias}
    return {name: tensors[alias]} | rest


def _renamed(tensors: dict[str, Stored], names: dict[str, str]) -> dict[str, Stored]:
    """Official names for the diffusers ones; what has none keeps its own, to be complained about."""
    official = {diffusers: name for name, diffusers in names.items()}
    return {official.get(name, name): stored for name, stored in tensors.items()}


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
