"""Describe a file or folder of weights and how an export would use it, without exporting."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.describe import Description, describe
from export.checkpoint.layouts import layout_named
from export.checkpoint.place import listing, real_folder
from export.checkpoint.single_files import OPTIONS
from export.files.tensor_file import Stored
from export.files.weights_files import SUFFIXES, read_weights
from export.lora.adapter import BESIDE, read_configs
from export.lora.experts import expert_of_file
from export.lora.file import lora_file
from export.lora.keys import SUFFIXES as LORA_SUFFIXES
from export.lora.keys import Role
from wan22.errors import UserError

FILES_MAX = 60
NOT_WEIGHTS = (".json", ".jsonl", ".onnx", ".txt", ".npz", ".npy", ".html", ".md")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
KIND_OF = {Role.DOWN: "LoRA", Role.HADA_W1_B: "LoHa", Role.LOKR_W1: "LoKr", Role.LOKR_W1_B: "LoKr"}
KIND_OF |= {Role.MAGNITUDE: "DoRA", Role.DIFF: "differences", Role.DIFF_BIAS: "differences"}


def inspect_weights(path: Path) -> list[dict[str, Any]]:
    """One entry for a file or a checkpoint's folder, or one for every file of weights in another folder.

    Raises:
        UserError: ``path`` does not exist, is a file that cannot be read, or contains no weights.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist", "engines, a bundle, a checkpoint or a file of weights", "check the path"
        )
    if path.is_file():
        return [_file(path)]
    folder = real_folder(path)
    names = listing(folder)
    if BESIDE in names:
        return [_file(lora_file(folder))]
    layout = layout_named(names)
    if layout is not None and layout.NAME != "files":
        return [_checkpoint(folder)]
    files = sorted(name for name in names if name.endswith(SUFFIXES))[:FILES_MAX]
    if not files:
        raise UserError(f"{path} holds no weights", "a checkpoint or files of weights", "point to the folder that does")
    return [_file_of_several(folder / name) for name in files]


def _measured(path: Path) -> dict[str, Any] | None:
    """The entry of a file that ``wan-trt calibrate`` wrote; None for others.

    Raises:
        UserError: the file's name says that it holds no weights.
    """
    if path.suffix == ".safetensors":
        linears = [name for name in read_weights(path).tensors if name.endswith(".input_mean")]
        what, option = f"means and factors of the inputs of {len(linears)} linears", "--input-means"
    elif path.suffix in NOT_WEIGHTS:
        try:
            content = json.loads(path.read_text()) if path.suffix == ".json" else {}
        except (ValueError, OSError, RecursionError):
            content = {}
        parts = [part for part in content.values() if isinstance(part, dict)] if isinstance(content, dict) else []
        linears = [name for part in parts for name, of in part.items() if isinstance(of, dict) and "input_scale" in of]
        what, option = f"static FP8 scales of the inputs of {len(linears)} linears", "--input-scales"
        if not linears:
            expected = "a file of weights, or one that wan-trt calibrate wrote"
            raise UserError(f"{path} is no file of weights", expected, "inspect the folder that it belongs to")
    else:
        return None
    use = f"reads it with {option} {path}"
    return {"path": str(path), "is": f"{what}, by wan-trt calibrate", "export": use} if linears else None


def _file_of_several(path: Path) -> dict[str, Any]:
    """The entry of a file beside others, also of one that cannot be read."""
    try:
        return _file(path)
    except UserError as error:
        return {"path": str(path), "is": error.found, "export": "refuses it"}


def _file(path: Path) -> dict[str, Any]:
    if (shard := SHARD.search(path.name)) and int(shard[2]) > 1:
        place = f"part {int(shard[1])} of {int(shard[2])} of one file of weights"
        return {"path": str(path), "is": place, "export": "reads the folder that holds all parts"}
    if (measured := _measured(path)) is not None:
        return measured
    found = describe(path)
    if found.model == "a LoRA":
        return _lora(path)
    entry = {"path": str(path), "is": found.model, "form": found.form, "types": dict(found.types)}
    if found.expert:
        entry["expert"] = f"{found.expert.replace('_', ' ')}, by its name"
    if found.holds_tokenizer:
        entry["tokenizer"] = "inside"
    return entry | {"export": _use(found)}


def _use(found: Description) -> str:
    if not found.part:
        return "refuses it"
    if "not supported" in found.model or "fix_5d" in found.model:
        return "refuses it"
    if found.part != "transformer":
        return f"reads it with {OPTIONS[found.part].replace('FILE', str(found.path))}"
    part = "dit" if found.channels == 48 else found.expert
    options = [OPTIONS[part]] if part else [OPTIONS["high_noise"], OPTIONS["low_noise"]]
    return f"reads it with {' or '.join(option.replace('FILE', str(found.path)) for option in options)}"


def _lora(path: Path) -> dict[str, Any]:
    found = read_weights(path)
    ranks: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for key, tensor in found.tensors.items():
        role = next((role for pattern, role in LORA_SUFFIXES if pattern.fullmatch(key)), None)
        if role in KIND_OF:
            kinds[KIND_OF[role]] += 1
        if role in (Role.DOWN, Role.HADA_W1_B) and tensor.shape:
            ranks[tensor.shape[0]] += 1
    metadata = {key: value for key, value in found.metadata.items() if isinstance(value, str)}
    configs, warnings = read_configs(path, metadata)
    scaled = sorted({f"alpha {config.lora_alpha:g}" for config in configs.values() if config.lora_alpha is not None})
    marks = {
        mark for mark in ("transformer.", "transformer_2.") if any(f"{mark}blocks" in key for key in found.tensors)
    }
    both = "transformer_2." in marks and "transformer." in marks
    expert = "both, one part for each" if both else expert_of_file(path, metadata) or "not named: all"
    suffix = f":{expert}" if expert in ("high", "low") else ""
    return {
        "path": str(path),
        "is": f"LoRA ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common()) or 'no known kind'})",
        "types": dict(Counter(t.dtype.name for t in found.tensors.values() if isinstance(t, Stored)).most_common()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "scale": ", ".join(scaled) or "from its own alphas, 1 without them",
        "expert": expert,
        "export": f"merges it with --lora {path}{suffix}",
    } | ({"notes": warnings} if warnings else {})


def _checkpoint(folder: Path) -> dict[str, Any]:
    try:
        checkpoint = open_checkpoint(folder)
    except UserError as error:
        found, _, rest = str(error).partition(" | ")
        return {"path": str(folder), "is": found, "export": f"refuses it: {rest.rpartition(' | ')[2]}"}
    return {
        "path": str(folder),
        "is": f"{checkpoint.spec.name} in the {checkpoint.source.layout} layout",
        "types": dict(_types(checkpoint)),
        "tokenizer": str(checkpoint.tokenizer),
        "export": f"wan-trt export {folder} FOLDER",
    }


def _types(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    for part, weights in checkpoint.weights.items():
        names = weights.names()
        kinds = Counter(weights.dtype(name).name if weights.stored(name) else "dequantised" for name in names)
        yield part, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def as_lines(entry: dict[str, Any]) -> Iterator[str]:
    """An entry of :func:`inspect_weights` as lines of text."""
    yield str(entry["path"])
    for key, value in entry.items():
        if key == "path":
            continue
        parts = [f"{name}: {count}" for name, count in value.items()] if isinstance(value, dict) else value
        yield f"  {key:10} {parts if isinstance(parts, str) else ', '.join(parts)}"
