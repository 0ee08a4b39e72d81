"""Build transformers and text encoder as stages (``wan-trt build --topology blocks``): engines that every block calls.

The compiler never sees a weight, so a build takes seconds and little memory. Experts with the same stages share their
engines; each has a weights file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.block_weights import attention_scales, layout_of, lora_rank, write_block_weights
from engines.gpu.attention import drop_batch, writes_its_output
from engines.lora_slots import add_slots, with_slots
from engines.targets import Target
from wan22.block_layout import EMBEDDING, BlockLayout, write_block_layout
from wan22.bundle import Bundle, file_entry, overwriting
from wan22.component import Component, File, Stage, Tensor
from wan22.errors import UserError
from wan22.files import scratch_folder
from wan22.parallel import Split, parse_split
from wan22.precision import Number
from wan22.progress import Progress
from wan22.specs import ModelSpec

TEXT_ENCODER = "text_encoder"
DTYPES = {Number.FP32: "float32", Number.BF16: "bfloat16", Number.FP16: "float16"}
Compile = Callable[[Path, Component, Stage], File]  # the engine of a stage's graph at a path, written to the bundle


@dataclass
class BlockBuild:
    """Build the experts and the text encoder of ``source`` into ``folder``, each stage once."""

    source: Bundle
    folder: Path
    progress: Progress
    compile: Compile
    groups: tuple[int, ...] = ()  # numbers of devices that shall be able to divide the tokens
    lora_slots: int | None = None  # the rank of slots for LoRAs in every linear of a transformer's blocks
    target: Target | None = None  # of the compiler, if it is one
    _built: dict[tuple[Stage, ...], tuple[tuple[Stage, ...], File, BlockLayout]] = field(default_factory=dict)

    def applies_to(self, component: Component) -> bool:
        in_layers = component.name == TEXT_ENCODER and bool(component.stages)  # older exports have none
        return component.name in self.source.manifest.spec.experts or in_layers

    def check(self) -> None:
        """Refuse a bundle whose transformers have no stages, before anything is compiled.

        Raises:
            UserError: its blocks do not compute alike, or an older version exported it.
        """
        for component in filter(self.applies_to, self.source.manifest.components):
            if not component.stages:
                found = f"--topology blocks for {component.name}, whose blocks differ"
                kept = "--keep-high-precision for single blocks and --input-scales"
                raise UserError(found, "blocks that compute alike", f"export again without {kept}, or build whole")
            missing = set(self.groups) - set(component.groups)
            if missing and component.name != TEXT_ENCODER:
                found = f"--parallel ulysses{min(missing)} for {component.name}"
                again = f"export again: {overwriting(self.source.manifest.command)}"
                raise UserError(found, "a bundle with this version's stages for several devices", again)

    def stages(self, component: Component) -> tuple[Stage, ...]:
        """The stages to build: those for one device, and those for the asked groups."""
        return tuple(stage for stage in component.stages if stage.groups in (1, *self.groups))

    @cached_property
    def attention_scales(self) -> dict[str, float]:
        """FP8 scales of Q and K: constants of the engines, valid for every block and expert."""
        experts = [c for c in self.source.manifest.components if c.name in self.source.manifest.spec.experts]
        return attention_scales([self.source.path(component.graph) for component in experts])

    def component(self, component: Component) -> Component:
        """``component`` with its stages as engines and its weights in one file."""
        if component.stages not in self._built:
            slotted = self.slotted(component)
            layout = self._layout(slotted)
            path = self.folder / f"{component.name}.layout.json"
            write_block_layout(path, layout)
            compiled = tuple(self._stage(component, stage) for stage in self.stages(slotted))
            self._built[component.stages] = (compiled, file_entry(self.folder, path), layout)
        stages, entry, layout = self._built[component.stages]
        weights = self.folder / f"{component.name}.weights"
        written = write_block_weights(self.source.path(component.graph), layout, weights, self.progress)
        made = replace(component, weights=(entry, written), stages=stages, halves=())
        return replace(made, graph=made.stage("layer" if component.name == TEXT_ENCODER else "rest").graph)

    def slotted(self, component: Component) -> Component:
        """``component`` with slots for LoRAs in its stages, if asked for."""
        if self.lora_slots is None or component.name == TEXT_ENCODER:
            return component
        return replace(component, stages=slotted_stages(component, self.lora_slots))

    def _layout(self, component: Component) -> BlockLayout:
        spec = self.source.manifest.spec
        if component.name != TEXT_ENCODER:
            return layout_of([stage for stage in component.stages if stage.groups == 1], spec.dit.layers)
        rows = (spec.text_encoder.vocab, spec.text_encoder.width)
        table = Tensor(EMBEDDING, DTYPES[component.precision.wide.linears], rows)
        return layout_of(component.stages, spec.text_encoder.layers, [table])

    def _stage(self, component: Component, stage: Stage) -> Stage:
        """``stage`` as an engine. The scales of FP8 attention become constants, as compilers need them."""
        graph, constants = self.source.path(stage.graph), self.attention_scales
        weights, direct = (
            tuple(t for t in stage.weights if t.name not in constants),
            writes_its_output(stage, self.target),
        )
        if len(weights) == len(stage.weights) and not direct and not any(map(lora_rank, weights)):
            return replace(stage, graph=self.compile(graph, component, stage))
        model = ir.load(graph)
        add_slots(model, stage)
        if direct:
            drop_batch(model.graph)
        for value in [value for value in model.graph.inputs if value.name in constants]:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.array(constants[str(value.name)], np.float32), name=value.name)
            model.graph.initializers[str(value.name)] = value
        with scratch_folder("build") as place:
            ir.save(model, place / graph.name)
            made = replace(stage, weights=weights)
            return replace(made, graph=self.compile(place / graph.name, component, made))


def slotted_stages(component: Component, rank: int) -> tuple[Stage, ...]:
    """The stages of a transformer with slots for LoRAs of ``rank``; without any for rank 0."""
    dtype = DTYPES[component.precision.wide.linears]
    return tuple(with_slots(stage, rank, dtype) if rank else stage for stage in component.stages)


def groups_of(parallel: str | None) -> tuple[int, ...]:
    """The numbers of devices that shall be able to divide the tokens, of an option such as "ulysses2,ulysses4".

    Raises:
        UserError: it does not say that.
    """
    splits = [parse_split(word) for word in parallel.split(",")] if parallel else []
    if any(split != Split(ulysses=split.ulysses) for split in splits):
        remedy = "leave out experts, cfg2 and vaeN, which need no engines of their own"
        raise UserError(f"--parallel {parallel} for engines", "ulyssesN, several with commas", remedy)
    return tuple(sorted({split.ulysses for split in splits}))


def check_groups(spec: ModelSpec, parallel: str, *, in_blocks: bool) -> None:
    """Refuse groups among which the model's heads do not divide, and engines that are not in blocks."""
    for count in groups_of(parallel):
        Split(ulysses=count).check(spec)
    if not in_blocks:
        raise UserError(f"--parallel {parallel} with whole engines", "engines in blocks", "add --topology blocks")
