"""diffusers' calls for LoRAs. A set of them is merged into the checkpoint's weights when the next video asks for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from runtime.pipeline import Pipeline
from wan22.errors import UserError

if TYPE_CHECKING:
    from export.lora.merge import LoraChoice

ONLY = "default"  # the adapter without a name


class LoraLoader:
    """The LoRAs of a pipeline. Each is active at strength 1 until ``set_adapters`` says otherwise."""

    pipeline: Pipeline
    checkpoint: str | None = None  # where it is now, if it has moved since the export

    def __init__(self) -> None:
        self._loras: dict[str, list[LoraChoice]] = {}
        self._active: dict[str, float] = {}  # strength by adapter
        self._sets: TemporaryDirectory[str] | None = None

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        load_into_transformer_2: bool = False,
        **unused: Any,
    ) -> None:
        """Add a LoRA: a file, or the folder of an adapter; ``weight_name`` is a file in a folder.

        It goes to the high-noise expert, or to the low-noise one with ``load_into_transformer_2``. One name may have a
        LoRA for each.

        Raises:
            UserError: there is no such file, or an argument that has no meaning here.
        """
        from export.lora.merge import LoraChoice

        if unused:
            raise UserError(f"load_lora_weights({next(iter(unused))}=...)", "a local file or folder", "leave it out")
        place = Path(path) / weight_name if weight_name is not None else Path(path)
        if isinstance(path, dict) or not place.exists():
            raise UserError(f"no LoRA {place}", "a local file or folder; nothing is downloaded", "name another")
        two = len(self.pipeline.spec.experts) > 1
        if load_into_transformer_2 and not two:
            found = f"load_into_transformer_2 for {self.pipeline.spec.name}"
            raise UserError(found, "a model of two experts", "leave it out")
        expert = ("low" if load_into_transformer_2 else "high") if two else None
        name = adapter_name or ONLY
        self._loras.setdefault(name, []).append(LoraChoice(place, expert=expert))
        self._active[name] = 1.0

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use these LoRAs alone, at these strengths. Raises UserError for an unknown name or another count."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = 1.0 if adapter_weights is None else adapter_weights
        weights = list(given) if isinstance(given, Sequence) else [given] * len(names)
        if unknown := [name for name in names if name not in self._loras]:
            raise UserError(f"adapter {unknown[0]!r}", f"one of {', '.join(self._loras) or 'none'}", "load it first")
        if len(weights) != len(names):
            raise UserError(f"{len(weights)} weights for {len(names)} adapters", "one for each", "give as many")
        self._active = {name: float(weight) for name, weight in zip(names, weights, strict=True)}

    def unload_lora_weights(self) -> None:
        """Go back to the bundle's own weights."""
        self._loras, self._active = {}, {}

    def _lora(self) -> str | None:
        """The name of the weight set in use, made on first use; None for the bundle's own."""
        from wan_trt.recipes.weight_sets import added_set

        choices = [
            replace(choice, strength=weight) for name, weight in self._active.items() for choice in self._loras[name]
        ]
        if not choices:
            return None
        self._sets = self._sets or TemporaryDirectory(prefix="wan-trt-loras-")
        return added_set(self.pipeline, choices, Path(self._sets.name), self.checkpoint)
