"""Build engines with weights as inputs (``--weights external``): one engine per graph, one weights file per component.

The two experts of a model have the same graph, so they share ``experts.plan``. The small VAE keeps embedded weights,
which fuse best.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from engines.gpu.external_weights import Weight, attention_scales_of, check_alike, externalise, layout, write_weights
from engines.gpu.tensorrt_backend import EngineOptions, build_engine
from wan22.bundle import Bundle, Component, File, file_entry
from wan22.external_layout import write_layout
from wan22.files import scratch_folder
from wan22.progress import Progress


class ExternalBuild:
    """Build the components of ``source`` into ``folder``, each graph once."""

    def __init__(self, source: Bundle, folder: Path, progress: Progress) -> None:
        self._source, self._folder, self._progress = source, folder, progress
        self._experts = source.manifest.spec.experts
        self._built: dict[str, tuple[File, File, str, Sequence[Weight]]] = {}

    def check(self) -> None:
        """Refuse graphs whose weights cannot be inputs, before anything is compiled.

        Raises:
            UserError: see :func:`engines.gpu.external_weights.externalise`.
        """
        for component in self._source.manifest.components:
            if self.applies_to(component):
                self._externalise(component)

    def applies_to(self, component: Component) -> bool:
        return component.name in (*self._experts, "text_encoder")

    def plan(self, component: Component) -> Path:
        shared = component.name in self._experts and len(self._experts) > 1
        return self._folder / f"{'experts' if shared else component.name}.plan"

    def component(self, component: Component, options: EngineOptions) -> Component:
        """The component with its engine, layout and weights.

        Raises:
            UserError: see :func:`engines.gpu.tensorrt_backend.build_engine`; or the experts' graphs differ.
        """
        graph, weights = self._externalise(component)
        plan = self.plan(component)
        if plan.name not in self._built:
            places = plan.with_suffix(".layout.json")
            write_layout(places, layout(weights)[0])
            with scratch_folder("build") as place:
                path = place / f"{plan.stem}.onnx"
                ir.save(graph, path)
                build_engine(path, plan, options, self._progress)
            entries = file_entry(self._folder, plan), file_entry(self._folder, places)
            self._built[plan.name] = (*entries, component.name, weights)
        engine, layout_entry, first, reference = self._built[plan.name]
        check_alike({first: reference, component.name: weights})
        target = self._folder / f"{component.name}.weights"
        written = write_weights(self._source.folder, weights, target, self._progress)
        return replace(component, graph=engine, weights=(layout_entry, written), stages=())

    @cached_property
    def attention_scales(self) -> dict[str, float]:
        """FP8 scales of Q and K: constants of the engine, valid for every expert."""
        components = [c for c in self._source.manifest.components if c.name in self._experts]
        return attention_scales_of(self._source.path(component.graph) for component in components)

    def _externalise(self, component: Component) -> tuple[ir.Model, tuple[Weight, ...]]:
        scales = self.attention_scales if component.name in self._experts else {}
        return externalise(self._source.path(component.graph), scales)
