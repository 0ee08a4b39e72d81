"""The files of one part of a checkpoint → its tensors, under the names that stand in the files."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from export.files.safetensors_file import read_safetensors
from export.files.tensor_file import Stored, check_regular
from export.files.torch_reader import read_torch
from wan22.errors import UserError

TRANSFORMER_STEM = "diffusion_pytorch_model"  # of official experts, and of diffusers' transformers and VAE
TEXT_ENCODER_STEM = "model"  # of transformers
AGAIN = "download the checkpoint again"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_part(place: Path, part: str) -> dict[str, Stored]:
    """Every tensor of an expert, "text_encoder" or "vae", from its file or folder; reads headers only.

    Raises:
        UserError: a folder, file or shard is missing, cut off or contradicts its index.
    """
    if place.suffix == ".pth":
        return read_torch(place)
    return _sharded(place, TEXT_ENCODER_STEM if part == "text_encoder" else TRANSFORMER_STEM)


def index_file(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def read_config(path: Path, kind: type[Any]) -> Any:
    """The JSON file at ``path`` as a ``kind``; fields that ``kind`` does not have are ignored."""
    check_regular(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "the model's configuration", AGAIN) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {error}", "the model's configuration", AGAIN) from None


def _sharded(folder: Path, stem: str) -> dict[str, Stored]:
    index, single = folder / index_file(stem), folder / f"{stem}.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder} has neither {index.name} nor {single.name}", "the weights", AGAIN)
        return read_safetensors(single)
    weight_map = read_config(index, _Index).weight_map
    _refuse_repeated_keys(index)
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UserError(f"{index} names the file {shard!r}", "a safetensors file beside it", AGAIN)
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing", f"every shard that {index.name} names", AGAIN)
        held = read_safetensors(folder / shard)
        if twice := sorted(held.keys() & tensors.keys()):
            other = tensors[twice[0]].path.name
            raise UserError(f"{twice[0]} lies in {other} and in {folder / shard}", "every tensor once", AGAIN)
        tensors |= held
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise UserError(f"{folder / shard} does not hold {name}", f"what {index.name} says", AGAIN)
    return tensors


def _refuse_repeated_keys(index: Path) -> None:
    """JSON readers take the last of two equal keys in silence; here they would name two shards for one tensor."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise UserError(f"{index} names {key} twice", "every tensor once", AGAIN)
            seen.add(key)

    json.loads(index.read_bytes(), object_pairs_hook=unique)
