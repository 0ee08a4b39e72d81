"""Single files of ComfyUI, GGUF publishers and trainers: one for every part, in any folder, without configurations.

A file's tensors identify its part, its name the expert.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from export.checkpoint.describe import Description, describe
from export.checkpoint.place import listing
from export.checkpoint.schema import part_tensors
from export.checkpoint.spec import (
    Parts,
    assembled,
    dit_from_shapes,
    experts_of,
    release_of,
    text_encoder_from_shapes,
    vae_from_shapes,
)
from export.files.weights_files import SUFFIXES
from wan22.errors import UserError
from wan22.specs import ModelSpec

NAME = "files"
FOLDERS = ("diffusion_models/", "text_encoders/", "unet/", "vae/", "clip/", "HighNoise/", "LowNoise/", "split_files/")
OPTIONS = {
    "high_noise": "--high-noise FILE",
    "low_noise": "--low-noise FILE",
    "dit": "--dit FILE",
    "text_encoder": "--text-encoder FILE",
    "vae": "--vae FILE",
}
CANDIDATES_MAX = 60  # most files of a folder to read


def recognise(names: Iterable[str]) -> bool:
    names = frozenset(names)
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    return bool(weights) and (any(name in FOLDERS for name in names) or not any("/" in name for name in weights))


def parts(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """The only matching file of ``folder`` for each part; ``given`` are the files that the user names."""
    names = sorted(name for name in listing(folder) if name.endswith(SUFFIXES))
    if len(names) > CANDIDATES_MAX:
        raise UserError(f"{folder} holds {len(names)} files of weights", "one model", _name_them(("high_noise", "vae")))
    files = [described for name in names if (described := describe(folder / name)).part]
    experts = _experts(folder, files, given)
    channels = next((file.channels for file in files if file.part == "transformer"), 0)
    found = dict(experts)
    for part in ("text_encoder", "vae"):
        fitting = [
            f for f in files if f.part == part and (part != "vae" or f.channels == (48 if channels == 48 else 16))
        ]
        if part not in given:
            found |= {part: _only(folder, part, fitting)}
    return found


def _experts(folder: Path, files: list[Description], given: Mapping[str, Path]) -> dict[str, Path]:
    transformers = [file for file in files if file.part == "transformer"]
    if "dit" in given or {"high_noise", "low_noise"} <= given.keys():
        return {}
    if any(file.channels == 48 for file in transformers):
        return {"dit": _only(folder, "dit", transformers)}
    found = {}
    for expert in ("high_noise", "low_noise"):
        if expert not in given:
            found[expert] = _only(folder, expert, [file for file in transformers if file.expert == expert])
    return found


def _only(folder: Path, part: str, files: list[Description]) -> Path:
    what = part.replace("_", " ")
    if not files:
        raise UserError(f"{folder} holds no {what}", "a file for every part", _name_them((part,)))
    if len(files) > 1:
        names = ", ".join(file.path.name for file in files[:3])
        raise UserError(f"{folder} holds {len(files)} files for {what}: {names}", "one", _name_them((part,)))
    return files[0].path


def _name_them(parts: Iterable[str]) -> str:
    return f"name it with {' '.join(OPTIONS[part] for part in parts)}"


def check_complete(files: Iterable[str]) -> None:
    """Refuse named files that do not make a complete model."""
    files = set(files)
    experts = ("dit",) if "dit" in files else ("high_noise", "low_noise")
    if "dit" in files and files & {"high_noise", "low_noise"}:
        raise UserError("--dit with an expert", "one transformer, or a high-noise and a low-noise one", "leave one out")
    if missing := [part for part in (*experts, "text_encoder", "vae") if part not in files]:
        found = f"no file for {', '.join(missing).replace('_', ' ')}"
        raise UserError(found, "a file for every part, or a checkpoint that has it", _name_them(missing))


def spec(_folder: Path, parts: Parts) -> ModelSpec:
    experts = experts_of(parts)
    dits = [dit_from_shapes(parts[expert]) for expert in experts]
    if dits[0] != dits[-1]:
        raise UserError(
            f"{experts[1]} has other dimensions than {experts[0]}", "two experts of one model", "swap the file"
        )
    text, vae = text_encoder_from_shapes(parts["text_encoder"]), vae_from_shapes(parts["vae"])
    return assembled(release_of(dits[0]), len(experts), dits[0], text, vae)


def names(part: str, spec: ModelSpec) -> dict[str, str]:
    """Files of any publisher are given official names before the model is known (:mod:`export.checkpoint.spelling`)."""
    return {name: name for name in part_tensors(part, spec)}
