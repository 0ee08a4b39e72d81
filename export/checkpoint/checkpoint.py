"""Open a Wan2.2 checkpoint of any layout, to read its tensors under official names.

All errors are found here, before any work: missing folders, files and shards, truncated files, and tensors that are
unknown, missing or of another shape than the model's (wan22.md §1). Only headers are read, so opening takes a second
for 126 GB. Dimensions without a config (official text encoder and VAE) follow from the tensors' shapes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.checkpoint import single_files
from export.checkpoint.describe import named_expert
from export.checkpoint.hub import commit_of, download, is_hub_name
from export.checkpoint.layouts import Layout, layout_of
from export.checkpoint.other_models import other_model, remedy_of
from export.checkpoint.part_files import read_part
from export.checkpoint.place import Place, real_folder
from export.checkpoint.schema import Shapes, part_tensors
from export.checkpoint.single_files import check_complete
from export.checkpoint.spec import RELEASES, Parts
from export.checkpoint.spelling import name_officially
from export.checkpoint.tokenizer import tokenizer_folder
from export.files.decoded import Codes, Decoded, Nvfp4, Scaled, Tensor, codes_of
from export.files.tensor_file import BFLOAT16, Array, Stored
from wan22.bundle import Source
from wan22.errors import UserError, some_of, warn_once
from wan22.inputs import check_regular
from wan22.progress import Progress, silent
from wan22.specs import ModelSpec

READABLE = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
NAMES_SHOWN = 3
SAMPLE_BYTES = 4096
EXPERTS = frozenset({"high_noise", "low_noise"})
SMALL = ("head.head.bias", "head.modulation", "patch_embedding.bias")  # tensors that differ between experts


class Weights(Protocol):
    """Tensors by official name.

    ``read`` returns a tensor in its dtype, ``pieces`` its elements in pieces. ``stored`` returns its place in a file if
    it is stored unchanged, ``codes`` the codes of a matrix that is stored in FP8.
    """

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype[Any]: ...
    def read(self, name: str) -> npt.NDArray[Any]: ...
    def pieces(self, name: str) -> Iterable[Array]: ...
    def stored(self, name: str) -> Stored | None: ...
    def codes(self, name: str) -> Codes | Nvfp4 | None: ...


@dataclass(frozen=True)
class FileWeights:
    """``Weights`` in files, in the order of the schema."""

    tensors: Mapping[str, Tensor]

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
        tensor = self.tensors[name]
        return tensor if isinstance(tensor, Stored) else None

    def codes(self, name: str) -> Codes | Nvfp4 | None:
        return codes_of(self.tensors[name])


@dataclass(frozen=True)
class Checkpoint:
    """``weights`` has one entry per expert of ``spec``, "text_encoder" and "vae"; ``tokenizer`` is a folder."""

    folder: Path
    source: Source
    spec: ModelSpec
    weights: Mapping[str, Weights]
    tokenizer: Path
    files: tuple[Path, ...]  # all files read


def open_checkpoint(where: str | Path, progress: Progress = silent) -> Checkpoint:
    """Open a folder of any layout, single files, or download a hub repository such as ``Wan-AI/Wan2.2-T2V-A14B``.

    ``where`` may name files for parts, with or without a folder: see :mod:`export.checkpoint.place`.

    Raises:
        UserError: it does not exist, is not a Wan2.2 checkpoint, or is damaged, incomplete or of unknown structure.
    """
    place = Place.parse(where)
    folder, layout, places = _locate(place)
    tokenizer = places.pop("tokenizer", None)
    raw = _read(places, place.files, progress)
    spec = layout.spec(folder, raw)
    own = {part: tensors for part, tensors in raw.items() if part not in place.files}
    parts = {part: _check(part, spec, _rename(tensors, layout.names(part, spec))) for part, tensors in own.items()}
    parts |= {part: _check(part, spec, raw[part]) for part in raw if part in place.files}
    _warn_of_experts(place, parts)
    text_encoder = place.files.get("text_encoder", places.get("text_encoder"))
    vocabulary = tokenizer_folder(tokenizer, text_encoder)
    weights = {part: FileWeights(parts[part]) for part in (*spec.experts, "text_encoder", "vae")}
    source = Source(str(where), layout.NAME, _fingerprint(folder, parts), commit_of(place.whole, folder))
    files = sorted({tensor.path for tensors in parts.values() for tensor in tensors.values()})
    return Checkpoint(folder, source, spec, weights, vocabulary, tuple(files))


def _locate(place: Place) -> tuple[Path, Layout, dict[str, Path]]:
    """The folder of a checkpoint, its layout, and the path of each part; the user's files replace its own."""
    for part, path in place.files.items():
        if not path.exists():
            raise UserError(f"{path} does not exist", f"the {part.replace('_', ' ')}", "check the path")
    for path in (path for path in place.paths if not path.is_dir()):
        check_regular(path)
    if not place.whole:
        check_complete(place.files)
        return Path(), single_files, dict(place.files)
    folder = download(place.whole) if is_hub_name(place.whole) else real_folder(Path(place.whole))
    layout = layout_of(folder)
    places = {**layout.parts(folder, place.files), **place.files}
    if "dit" in places and places.keys() & {"high_noise", "low_noise"}:
        raise UserError(f"{place} has one transformer and two experts", "either", "leave the other's file out")
    return folder, layout, places


def _read(places: Mapping[str, Path], given: Mapping[str, Path], progress: Progress) -> Parts:
    """The tensors of every part under its layout's names; those of single files under official names."""
    raw: dict[str, Mapping[str, Tensor]] = {}
    for done, (part, place) in enumerate(places.items(), 1):
        tensors = read_part(place, part)
        raw[part] = name_officially(part, tensors) if part in given or place.is_file() else tensors
        _refuse_unreadable(part, raw[part])
        progress("open checkpoint", done, len(places), "parts")
    return raw


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Map names to official ones. Unknown names are kept, so that the schema check reports them."""
    return {names.get(name, name): stored for name, stored in tensors.items()}


def _warn_of_experts(place: Place, parts: Parts) -> None:
    """Warn of files whose names contradict the experts that the user says they are, and of one expert given twice.

    Nothing in the weights tells a high-noise expert from a low-noise one.
    """
    for expert in EXPERTS & place.files.keys():
        path = place.files[expert]
        named = named_expert(path.stem)
        if named and f"{named}_noise" != expert:
            warn_once(f"{path} is named {named} noise and is read as the {expert.replace('_', '-')} expert")
    if parts.keys() >= EXPERTS:
        high, low = (np.concatenate([parts[e][n].read().ravel() for n in SMALL]) for e in ("high_noise", "low_noise"))
        if np.count_nonzero(high) and np.array_equal(high, low):
            warn_once(f"{place}: both experts are the same weights; a Wan2.2 A14B has two different ones")


def _refuse_unreadable(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse other models, by their keys, and repacks that keep a prefix or codes."""
    remedy = "use the official or the -Diffusers checkpoint"
    for name, stored in tensors.items():
        if name.startswith(("model.diffusion_model.", "diffusion_model.")):
            raise UserError(f"{part}: {name}, a repack for ComfyUI", "the prefix before all names or none", remedy)
        if stored.dtype not in READABLE:
            raise UserError(f"{part}: {name} is {stored.dtype}", "float32, bfloat16 or float16", remedy)
    if part not in ("text_encoder", "vae") and (model := other_model(tensors)):
        foreign = [name for name in tensors if other_model([name])]
        found = f"{part} is {model}, not supported: {len(foreign)} unknown: {some_of(foreign, NAMES_SHOWN)}"
        raise UserError(found, RELEASES, remedy_of(model))


def _check(part: str, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part in the schema's order. Raises UserError for other names or shapes than the schema's."""
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


def _refuse_mixed_types(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse block matrices of different types; releases keep only some vectors and embeddings in float32."""
    if any(isinstance(stored, Decoded) and not _plain_cast(stored) for stored in tensors.values()):
        return  # quantisers leave some matrices unchanged
    first: tuple[str, Tensor] | None = None
    for name, stored in tensors.items():
        if not name.startswith("blocks.") or len(stored.shape) != 2 or "embedding" in name:
            continue
        first = first or (name, stored)
        if _stored_type(stored) != _stored_type(first[1]):
            found = (
                f"{part}: {name} is {_stored_type(stored)} in {stored.path.name}, {first[0]} {_stored_type(first[1])}"
            )
            raise UserError(found, "one type, not shards of two downloads", "download that shard again")


def _plain_cast(tensor: Tensor) -> bool:
    """True if ``tensor`` is FP8 without a scale."""
    return isinstance(tensor, Scaled) and not tensor.scales


def _stored_type(tensor: Tensor) -> np.dtype[Any]:
    return tensor.weight.dtype if isinstance(tensor, Decoded) else tensor.dtype


def _fingerprint(folder: Path, parts: Parts) -> str:
    """The SHA-256 of all tensors' names, dtypes and shapes, and of all files' sizes and a few of their bytes.

    The bytes tell fine-tuned models of the same structure apart. To read all of them would take minutes.
    """
    lines = [
        f"{part}/{name} {stored.dtype} {list(stored.shape)}"
        for part, tensors in parts.items()
        for name, stored in tensors.items()
    ]
    files = {stored.path for tensors in parts.values() for stored in tensors.values()}
    inside = {path: path.relative_to(folder).as_posix() for path in files if path.is_relative_to(folder)}
    lines += [f"{inside.get(path, path.name)} {path.stat().st_size} {_samples(path)}" for path in files]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _samples(path: Path) -> str:
    """The SHA-256 of some KiB at a quarter, half and three quarters of a file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for quarter in (1, 2, 3):
            file.seek(size * quarter // 4)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
