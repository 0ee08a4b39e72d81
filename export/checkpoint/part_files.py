"""Read the tensors of a checkpoint's part from its file or folder, under the files' names, with scales applied."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from export.checkpoint.quantised import MARKS, apply_scales
from export.files.decoded import GgufBlocks, Tensor
from export.files.weights_files import SUFFIXES, WeightsFile, read_weights, refuse_stand_in
from wan22.errors import DAMAGED_JSON, UserError
from wan22.inputs import check_regular

TRANSFORMER_STEM = "diffusion_pytorch_model"  # official experts, and diffusers' transformers and VAE
TEXT_ENCODER_STEM = "model"  # transformers
AGAIN = "download the checkpoint again"
# Prefixes before all names of a part; those of all-in-one files identify the part.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "_orig_mod.", "module.", "net.", "model.")
PREFIXES_OF = {
    "text_encoder": ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "cond_stage_model."),
    "vae": ("vae.", "first_stage_model."),
}
ARCHITECTURES = ("wan", "pig", "cow", "t5", "t5encoder")  # in GGUF; some writers omit it
OTHER_PARTS = re.compile(r"models_t5|umt5|vae", re.IGNORECASE)  # names of files that may be next to a transformer's


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_part(place: Path, part: str) -> dict[str, Tensor]:
    """Every tensor of an expert, "text_encoder" or "vae", from its file or folder; reads headers and scales only.

    Raises:
        UserError: a folder, file or shard is missing, truncated or contradicts its index; a scale is invalid.
    """
    found = read_files(place, part)
    _refuse_other_gguf(part, found)
    tensors = without_prefix(part, found.tensors)
    return apply_scales(part, tensors, found.metadata)


def _refuse_other_gguf(part: str, found: WeightsFile) -> None:
    """Refuse other architectures, and transformers without their only tensor of 5 dimensions."""
    architecture = found.metadata.get("general.architecture")
    if architecture is not None and architecture not in ARCHITECTURES:
        known = "wan, or t5 for the text encoder"
        raise UserError(f"{part}: a GGUF of architecture {architecture}", known, "use a GGUF of Wan2.2")
    blocks = any(isinstance(tensor, GgufBlocks) for tensor in found.tensors.values())
    transformer = any("self_attn.q.weight" in name for name in found.tensors)
    if blocks and transformer and not any(name.endswith("patch_embedding.weight") for name in found.tensors):
        what = f"{part}: a GGUF without patch_embedding.weight, made without the step that adds tensors of 5 dimensions"
        raise UserError(what, "a complete GGUF", "use one of another publisher")


def read_files(place: Path, part: str) -> WeightsFile:
    """Read a part as :func:`read_part`, but without changing names or applying scales."""
    if place.name.endswith(".safetensors.index.json"):
        return _indexed(place.parent, place)
    if (shard := re.fullmatch(r"(.+)-0*(\d+)-of-0*(\d+)(?:\.\w+)?\.safetensors", place.name)) and shard[3] != "1":
        index = place.with_name(index_file(shard[1]))
        remedy = f"name {index if index.is_file() else place.parent}"
        raise UserError(f"{place} is shard {shard[2]} of {shard[3]}", "all shards of the part", remedy)
    if place.is_dir() or not place.suffix:
        return _folder(place, TEXT_ENCODER_STEM if part == "text_encoder" else TRANSFORMER_STEM)
    return read_weights(place)


def without_prefix(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``part`` without the common prefix of their names."""
    own = PREFIXES_OF.get(part, PREFIXES[:1])
    others = [p for other, prefixes in PREFIXES_OF.items() if other != part for p in prefixes]
    if any(key.startswith(own) for key in tensors) and any(key.startswith(tuple(others)) for key in tensors):
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(own)}
    while prefix := _common(tensors, (*PREFIXES_OF.get(part, ()), *PREFIXES)):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def _common(tensors: Iterable[str], prefixes: Iterable[str]) -> str:
    names = [key for key in tensors if key.rpartition(".")[2] not in MARKS]
    return next((p for p in prefixes if names and all(name.startswith(p) for name in names)), "")


def index_file(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def read_config(path: Path, kind: type[Any]) -> Any:
    """The JSON file at ``path`` as a ``kind``; unknown fields are ignored."""
    check_regular(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "the model's configuration", AGAIN) from None
    except DAMAGED_JSON as error:
        refuse_stand_in(path)
        raise UserError(f"{path}: {error}", "the model's configuration", AGAIN) from None


def _folder(folder: Path, stem: str) -> WeightsFile:
    """The weights of a folder: by its index, its one file, its shards, or its only file of weights."""
    index, single = folder / index_file(stem), folder / f"{stem}.safetensors"
    if not index.is_file() and not single.is_file():
        index, single = _variant(folder, stem)
    if index.is_file():
        shards = set(_weight_map(index).values())
        if not single.is_file() or any((folder / shard).is_file() for shard in shards):
            return _indexed(folder, index)
    if single.is_file():
        return read_weights(single)
    if series := _whole_series(folder, stem):
        return _together([(path, read_weights(path)) for path in series])
    others = sorted(path for path in _files(folder) if path.suffix in SUFFIXES and not OTHER_PARTS.search(path.name))
    if len(others) == 1:
        return read_weights(others[0])
    if len(others) > 1:
        names = ", ".join(path.name for path in others[:3])
        raise UserError(f"{folder} holds {len(others)} files of weights: {names}", "one", "name the file that you mean")
    raise UserError(f"{folder} has neither {index.name} nor {single.name}", "the weights", _unfinished(folder))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _variant(folder: Path, stem: str) -> tuple[Path, Path]:
    """The index and file of the only variant, such as ``stem.bf16.safetensors``; the usual names without one."""
    pattern = rf"{re.escape(stem)}(?:\.safetensors\.index\.(\w+)\.json|\.(\w+)\.safetensors)"
    matches = [match for path in _files(folder) if (match := re.fullmatch(pattern, path.name))]
    variants = sorted({match[1] or match[2] for match in matches})
    if len(variants) > 1:
        raise UserError(
            f"{folder} holds the variants {', '.join(variants)}", "one of them", "move the others elsewhere"
        )
    if not variants:
        return folder / index_file(stem), folder / f"{stem}.safetensors"
    return folder / f"{stem}.safetensors.index.{variants[0]}.json", folder / f"{stem}.{variants[0]}.safetensors"


def _whole_series(folder: Path, stem: str) -> list[Path]:
    """The shards of a folder without an index. Raises UserError if one is missing."""
    pattern = rf"{re.escape(stem)}-(\d+)-of-(\d+)(?:\.\w+)?\.safetensors"
    found = {int(m[1]): (int(m[2]), path) for path in _files(folder) if (m := re.fullmatch(pattern, path.name))}
    totals = {total for total, _ in found.values()}
    if len(totals) != 1:
        return []
    if missing := sorted(set(range(1, totals.pop() + 1)) - found.keys()):
        raise UserError(f"{folder}: shard {missing[0]} of {stem} is missing", "all shards", _unfinished(folder))
    return [found[number][1] for number in sorted(found)]


def _unfinished(folder: Path) -> str:
    """The remedy: resume an interrupted download, else download again."""
    caches = [parent / ".cache" / "huggingface" for parent in (folder, *folder.parents[:3])]
    if any(next(cache.rglob("*.incomplete"), None) for cache in caches if cache.is_dir()):
        return "run the download again: it was interrupted and will resume"
    return AGAIN


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor. Raises UserError for anything but the name of a safetensors file."""
    weight_map: dict[str, str] = read_config(index, _Index).weight_map
    for shard in weight_map.values():
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard, re.ASCII):
            raise UserError(f"{index} names the file {shard[:80]!r}", "a safetensors file next to it", AGAIN)
    return weight_map


def _indexed(folder: Path, index: Path) -> WeightsFile:
    weight_map = _weight_map(index)
    _refuse_repeated_keys(index)
    shards = []
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            found = f"{folder / shard} is missing"
            raise UserError(found, f"every shard that {index.name} names", _unfinished(folder))
        shards.append((folder / shard, read_weights(folder / shard)))
    whole = _together(shards)
    for name, shard in weight_map.items():
        if name not in whole.tensors or whole.tensors[name].path.name != shard:
            raise UserError(f"{folder / shard} does not hold {name}", f"what {index.name} says", AGAIN)
    return whole


def _together(shards: Iterable[tuple[Path, WeightsFile]]) -> WeightsFile:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for path, held in shards:
        if twice := sorted((held.tensors.keys() & tensors.keys()) - set(MARKS)):
            other = tensors[twice[0]].path.name
            raise UserError(f"{twice[0]} lies in {other} and in {path}", "every tensor once", AGAIN)
        tensors |= held.tensors
        metadata |= held.metadata
    return WeightsFile(tensors, metadata)


def _refuse_repeated_keys(index: Path) -> None:
    """Refuse an index with repeated keys, which JSON readers silently reduce to the last."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise UserError(f"{index} names {key} twice", "every tensor once", AGAIN)
            seen.add(key)

    try:
        json.loads(index.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # in a field that the reader of the index ignores
        raise UserError(f"{index}: {error}", "the index as JSON", AGAIN) from None
