"""Named sets of the experts' weights beside those of a bundle: the same engines with other LoRAs.

A set is a bundle that holds the experts alone, made by :mod:`wan_trt.recipes.weight_sets`. One set is in use at a time.
Engines in blocks keep their stages and take other weights; those with slots for LoRAs keep their weights as well and
take a small file beside them. A whole graph for ONNX Runtime is opened again.
"""

from collections.abc import Mapping
from dataclasses import replace

from wan22.bundle import Bundle, Manifest
from wan22.component import Component, File
from wan22.errors import UserError


class WeightSets:
    """The sets of one pipeline by name; "" is the bundle's own weights."""

    def __init__(self, base: Bundle, sets: Mapping[str, Bundle]) -> None:
        self._base, self._sets, self._chosen = base, dict(sets), ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sets)

    @property
    def rank(self) -> int:
        """The rank of the engines' slots for LoRAs; 0 without."""
        return lora_slots(self._base.manifest)

    def add(self, name: str, bundle: Bundle) -> None:
        self._sets[name] = bundle

    def choose(self, name: str | None) -> bool:
        """Use the set ``name``, None for the bundle's own weights; True if it was not in use.

        Raises:
            UserError: there is no such set.
        """
        check_lora(name, self.names)
        changed, self._chosen = self._chosen != (name or ""), name or ""
        return changed

    def component(self, name: str) -> Component:
        """Component ``name`` with the files of the set in use; its paths are for the base bundle's folder."""
        own = self._base.component(name)
        bundle = self._sets.get(self._chosen)
        if bundle is None or name not in self._base.manifest.spec.experts:
            return own
        chosen = bundle.component(name)
        weights = tuple(_absolute(bundle, file) for file in chosen.weights)
        if self.rank:
            return replace(own, weights=(*own.weights, *weights))
        if own.in_stages:
            return replace(own, weights=weights)
        graph, halves = _absolute(bundle, chosen.graph), tuple(_absolute(bundle, half) for half in chosen.halves)
        return replace(own, graph=graph, halves=halves, weights=weights)

    def manifest(self, name: str | None) -> Manifest:
        """The manifest that names the weights of set ``name``."""
        return self._sets[name].manifest if name else self._base.manifest


def lora_slots(manifest: Manifest) -> int:
    """The rank of the slots for LoRAs of engines with ``manifest``; 0 without."""
    return int(manifest.build.options.get("lora_slots", 0)) if manifest.build else 0


def check_lora(name: str | None, known: tuple[str, ...]) -> None:
    """Refuse a name that is not among the ``known`` sets."""
    if name is not None and name not in known:
        expected = f"one of {', '.join(known)}" if known else "none: this server has no LoRAs"
        raise UserError(f"lora {name!r}", expected, "name one of them, or start the server with it")


def _absolute(bundle: Bundle, file: File) -> File:
    return replace(file, path=str(bundle.path(file).resolve()))
