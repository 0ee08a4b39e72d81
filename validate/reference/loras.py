"""LoRAs of a bundle, merged into the reference's weights; the implementation shares nothing with the export's.

The bundle records each LoRA's file, hash, strength and experts, but not its content. A key is parsed by dropping words
from its front until a module of the model remains. Scales and formulas follow the libraries that train such files
(peft, LyCORIS). Products are dense and in float32.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wan22.bundle import Manifest, MergedLora, sha256_of
from wan22.errors import UserError
from wan22.specs import ModelSpec

if TYPE_CHECKING:
    from export.checkpoint.checkpoint import Checkpoint, Weights
    from export.files.decoded import Codes, Nvfp4
    from export.files.tensor_file import Stored

PUT_BACK = "restore the file that was merged, or export again"
BESIDE = "adapter_config.json"
# Words before a module name that carry no meaning.
FRONT = frozenset(("base", "model", "diffusion", "transformer", "lora", "unet", "lycoris", "pipe", "dit", "module"))
FRONT |= {"net", "orig", "mod", "1", "2"}
ENDS = {  # role → endings of a key after the module, dots as underscores
    "down": ("lora_down", "lora_a", "lora_a_default", "lora_linear_layer_down"),
    "up": ("lora_up", "lora_b", "lora_b_default", "lora_linear_layer_up"),
    "up bias": ("lora_b_bias", "lora_b_default_bias"),
    "alpha": ("alpha",),
    "magnitude": ("dora_scale", "magnitude", "lora_magnitude_vector", "lora_magnitude_vector_default"),
    "+weight": ("diff", "w_norm"),
    "+bias": ("diff_b", "b_norm"),
    "+modulation": ("diff_m", "modulation_diff", "scale_shift_table_diff"),
    "=weight": ("weight", "set_weight", "modules_to_save_default_weight", "modules_to_save_weight"),
    "=bias": ("bias", "modules_to_save_default_bias", "modules_to_save_bias"),
    "=modulation": ("modulation", "scale_shift_table"),
    **{f"hada_w{n}_{x}": (f"hada_w{n}_{x}",) for n in "12" for x in "ab"},
    **{f"lokr_w{n}{x}": (f"lokr_w{n}{x}",) for n in "12" for x in ("", "_a", "_b")},
}
ROLES = {end: role for role, ends in ENDS.items() for end in ends}


def with_loras(checkpoint: "Checkpoint", manifest: Manifest) -> "Checkpoint":
    """``checkpoint`` with the LoRAs of ``manifest`` merged into its experts' weights on reading.

    Raises:
        UserError: a LoRA file is missing or is not the one that was merged.
    """
    loras = [_open_lora(record, manifest.spec) for record in manifest.loras]
    experts = {}
    for name in manifest.spec.experts:
        its_loras = tuple(lora for lora in loras if name in lora.record.experts)
        experts[name] = _Merged(checkpoint.weights[name], its_loras, name) if its_loras else checkpoint.weights[name]
    return replace(checkpoint, weights={**checkpoint.weights, **experts})


def _open_lora(record: MergedLora, spec: ModelSpec) -> "_Lora":
    path = Path(record.file)
    if not path.is_file():
        raise UserError(f"LoRA {path} is missing", "the file that was merged into the engines", PUT_BACK)
    if (found := sha256_of(path)) != record.sha256:
        raise UserError(f"LoRA {path}: sha256 {found[:12]}…", f"{record.sha256[:12]}… of the engines", PUT_BACK)
    beside = path.parent / BESIDE
    if record.config_sha256 and (not beside.is_file() or sha256_of(beside) != record.config_sha256):
        raise UserError(f"{beside} changed since the export", f"sha256 {record.config_sha256[:12]}…", PUT_BACK)
    return _Lora(record, spec)


@dataclass(frozen=True)
class _Lora:
    record: MergedLora
    spec: ModelSpec

    @cached_property
    def keys(self) -> dict[tuple[str, str], dict[str, str]]:
        """Keys by role, for every expert ("" for any) and official module."""
        found: dict[tuple[str, str], dict[str, str]] = {}
        modules = _modules(self.spec)
        for key in self._names:
            if (meaning := _meaning(key, modules)) is not None:
                front, module, role = meaning
                expert = self._expert(front)
                found.setdefault((expert, module), {})[role] = key
        return found

    def _expert(self, front: list[str]) -> str:
        """The expert that the words before a module name; "" for any.

        "transformer" means the first expert only in files that also name a second one.
        """
        split = any(re.search(r"transformer_[12]\.", key) for key in self._names)
        if not split or "transformer" not in front:
            return ""
        return "low_noise" if "2" in front else "high_noise"

    @property
    def _path(self) -> Path:
        return Path(self.record.file)

    @cached_property
    def _state(self) -> dict[str, Any] | None:
        """The content of a pickled file; None for safetensors, which is read tensor by tensor."""
        import torch

        return None if self._path.suffix == ".safetensors" else torch.load(self._path, weights_only=True)

    @cached_property
    def _names(self) -> list[str]:
        from safetensors import safe_open

        if self._state is not None:
            return list(self._state)
        with safe_open(self._path, "pt") as file:
            return list(file.keys())

    def tensor(self, key: str) -> Any:
        """The tensor of ``key`` in float32."""
        from safetensors import safe_open

        if self._state is not None:
            return self._state[key].float()
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(key).float()

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The adapter's configuration by expert; "" for any."""
        from safetensors import safe_open

        header: dict[str, str] = {}
        if self._state is None:
            with safe_open(self._path, "pt") as file:
                header = file.metadata() or {}
        found: dict[str, dict[str, Any]] = {"": {}}
        if self.record.config_sha256:
            found[""] = json.loads((self._path.parent / BESIDE).read_text())
        if "lora_config" in header:
            found[""] = json.loads(header["lora_config"])
        for name, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
            owner, _, field = name.partition(".") if name.startswith("transformer") else ("transformer", "", name)
            found.setdefault({"transformer_2": "low_noise"}.get(owner, "high_noise"), {})[field] = value
        if "low_noise" not in found:
            found[""] = found.pop("high_noise", found[""])
        return found

    def update(self, weight: Any, name: str, expert: str) -> Any:
        """Apply this LoRA to the float32 tensor ``weight``, named ``name``, of ``expert``."""
        module, _, leaf = name.rpartition(".")
        for owner in ("", expert):
            roles = self.keys.get((owner, module))
            if roles:
                weight = self._module(weight, leaf, roles, self.configs.get(owner, self.configs[""]))
        return weight

    def _module(self, weight: Any, leaf: str, roles: Mapping[str, str], config: Mapping[str, Any]) -> Any:
        import torch

        strength = self.record.strength
        if (key := roles.get(f"={leaf}")) is not None:
            whole = self.tensor(key)
            weight = whole if strength == 1 else torch.lerp(weight, whole, strength)
        if leaf == "weight" and (product := self._product(roles, config)) is not None:
            product, scale = product
            if "magnitude" not in roles:
                weight = weight + ((strength * scale) * product).reshape(weight.shape)
            else:
                trained = self._decompose(weight + (scale * product).reshape(weight.shape), roles["magnitude"])
                weight = trained if strength == 1 else torch.lerp(weight, trained, strength)
        if leaf == "bias" and "up bias" in roles:
            scale = self._scale(roles, config, len(self.tensor(roles["down"])))
            weight = weight + (strength * scale) * self.tensor(roles["up bias"])
        if (key := roles.get(f"+{leaf}")) is not None and (change := self.tensor(key)).shape == weight.shape:
            weight = weight + strength * change
        return weight

    def _decompose(self, total: Any, key: str) -> Any:
        magnitude = self.tensor(key)
        columns = magnitude.ndim == 2 and magnitude.shape[0] == 1 and total.shape[0] != 1
        flat = total.flatten(1)
        norm = flat.norm(dim=0, keepdim=True) if columns else flat.norm(dim=1, keepdim=True)
        return (flat * magnitude.reshape(norm.shape) / norm).reshape(total.shape)

    def _product(self, roles: Mapping[str, str], config: Mapping[str, Any]) -> tuple[Any, float] | None:
        """The unscaled weight difference as a matrix, and its scale; None if the LoRA has no product."""
        import torch

        of = {role: self.tensor(key).flatten(1) for role, key in roles.items() if role in MATRICES}
        if "up" in of:
            return of["up"] @ of["down"], self._scale(roles, config, len(of["down"]))
        if "hada_w1_a" in of:
            product = (of["hada_w1_a"] @ of["hada_w1_b"]) * (of["hada_w2_a"] @ of["hada_w2_b"])
            return product, self._scale(roles, config, len(of["hada_w1_b"]))
        if not any(role.startswith("lokr") for role in of):
            return None
        ranks = [len(of[f"lokr_w{n}_b"]) for n in "21" if f"lokr_w{n}_b" in of]
        sides = [of[f"lokr_w{n}"] if f"lokr_w{n}" in of else of[f"lokr_w{n}_a"] @ of[f"lokr_w{n}_b"] for n in "12"]
        if config.get("peft_type") == "LOKR":
            ranks = [config["r"]]
        return torch.kron(*sides), self._scale(roles, config, ranks[0]) if ranks else 1.0

    def _scale(self, roles: Mapping[str, str], config: Mapping[str, Any], rank: float) -> float:
        """alpha/rank, or alpha/sqrt(rank) for rsLoRA."""
        alpha = config.get("alpha" if config.get("peft_type") in ("LOHA", "LOKR") else "lora_alpha")
        key = next(iter(roles.values())).removeprefix("base_model.model.")
        path = re.split(r"\.(?:lora_|lora\.|hada_|lokr_)", key)[0]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        if "alpha" in roles:
            alpha = float(self.tensor(roles["alpha"]))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if alpha else 1.0


MATRICES = frozenset(role for role in ENDS if role in ("down", "up") or role.startswith(("hada", "lokr")))


def _modules(spec: ModelSpec) -> dict[str, str]:
    """Map official and diffusers' module names, dots as underscores, to official module names."""
    from export.checkpoint.keys import diffusers_names

    pairs = [(spelled, name) for name, theirs in diffusers_names("dit", spec).items() for spelled in (name, theirs)]
    return {spelled.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for spelled, name in pairs}


def _meaning(key: str, modules: Mapping[str, str]) -> tuple[list[str], str, str] | None:
    """Parse ``key``: the words before the module, the official module and the role; None for an unknown module."""
    words = re.sub(r"[._]+", "_", key).lower().strip("_").split("_")
    for front in range(len(words)):
        for end in range(len(words), front, -1):
            module, rest = "_".join(words[front:end]), "_".join(words[end:])
            role = ROLES.get(rest) or ROLES.get(rest.removesuffix("_weight")) or ROLES.get(f"lora_{rest}")
            if module in modules and role:
                return words[:front], modules[module], role
        if words[front] not in FRONT:
            return None
    return None


@dataclass(frozen=True)
class _Merged:
    """The ``Weights`` of an expert with LoRAs merged in."""

    base: "Weights"
    loras: tuple[_Lora, ...]
    expert: str

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.read(name).dtype

    def read(self, name: str) -> NDArray[Any]:
        import torch

        own = self.base.read(name)
        before = weight = torch.from_numpy(np.array(own, np.float32))
        for lora in self.loras:
            weight = lora.update(weight, name, self.expert)
        return own if weight is before else weight.numpy()

    def pieces(self, name: str) -> Iterable[NDArray[Any]]:
        return [self.read(name)]

    def stored(self, name: str) -> "Stored | None":  # noqa: ARG002  # only the export shares files
        return None

    def codes(self, name: str) -> "Codes | Nvfp4 | None":  # noqa: ARG002  # nor does the reference multiply FP8
        return None
