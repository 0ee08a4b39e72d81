"""Transformers in stages for a pipeline: where their weights are, and the memory that they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from runtime.block_forward import StageDevice
from runtime.block_stream import NOTHING, Streamed
from runtime.block_transformer import BlockTransformer, SharedBlocks
from wan22.block_memory import (
    SLICES,
    BlockChoice,
    BlockMemory,
    WeightsIn,
    block_memory,
    choose_blocks,
    least_slots,
    smallest_budget,
)
from wan22.bundle import Bundle, Component
from wan22.errors import UserError
from wan22.external_layout import BlockLayout, read_block_layout
from wan22.quantities import human_bytes
from wan22.residency import Memory, Video
from wan22.shapes import Profile
from wan22.specs import tokens


@dataclass(frozen=True)
class BlockOptions:
    weights_in: WeightsIn = "auto"
    vram: float | None = None  # the most memory that a transformer may take, in bytes; None: what is free


BLOCKS_AS_FIT = BlockOptions()


def check_options(bundle: Bundle, options: BlockOptions) -> None:
    """Refuse options that the engines of ``bundle`` cannot follow."""
    if options != BLOCKS_AS_FIT and not any(component.in_stages for component in bundle.manifest.components):
        remedy = "leave --weights-in and --vram out, or run wan-trt build --topology blocks"
        raise UserError(f"--weights-in or --vram for {bundle.folder}", "engines in blocks", remedy)


class BlockBackend:
    """The experts of ``bundle``. Those with the same stages share a device and its slots."""

    def __init__(
        self,
        bundle: Bundle,
        options: BlockOptions,
        device: Callable[[tuple[Component, ...], BlockLayout], StageDevice],
        available_bytes: Callable[[], float],
    ) -> None:
        """``device`` makes the device for experts with the same stages; ``available_bytes`` is what is free."""
        self._bundle, self._options, self._available = bundle, options, available_bytes
        self._device, self._shared = device, dict[str, SharedBlocks]()

    def applies_to(self, name: str) -> bool:
        return self._bundle.component(name).in_stages

    def engine(self, component: Component, profiles: Sequence[Profile]) -> BlockTransformer:
        spec, key = self._bundle.manifest.spec, component.stages[0].graph.path
        if key not in self._shared:
            alike = tuple(c for c in self._bundle.manifest.components if c.stages == component.stages)
            layout = self._layout(component)
            choose = self._chooser(component)
            self._shared[key] = SharedBlocks(self._device(alike, layout), layout, choose)
        return BlockTransformer(self._shared[key], spec.dit, component, profiles)

    @property
    def streamed(self) -> Streamed:
        """What all experts have copied so far."""
        return sum((shared.streamed for shared in self._shared.values()), NOTHING)

    def check(self, video: Video) -> None:
        """Refuse a video that does not fit, before anything is loaded.

        Raises:
            UserError: names the smallest budget that works.
        """
        for component in self._bundle.manifest.components:
            if component.in_stages:
                self._chooser(component)(tokens(self._bundle.manifest.spec.latent_shape(*video)))

    def memory(self, name: str, video: Video, *, resident: bool) -> Memory:
        """The memory of one expert, all of its blocks ``resident`` or as few as possible."""
        component, spec = self._bundle.component(name), self._bundle.manifest.spec
        found = self._memory(component, tokens(spec.latent_shape(*video)), resident=resident)
        slots = found.slots if name == self._first[component.stages[0].graph.path] else 0.0
        return Memory(name, slots + found.text, found.x + found.edges + found.scratch, 0.0)

    @cached_property
    def _first(self) -> dict[str, str]:
        """By stages, the expert that counts for the slots that all of them share."""
        found: dict[str, str] = {}
        for component in self._bundle.manifest.components:
            if component.in_stages:
                found.setdefault(component.stages[0].graph.path, component.name)
        return found

    def _layout(self, component: Component) -> BlockLayout:
        return read_block_layout(self._bundle.path(component.weights[0]))

    def _memory(self, component: Component, count: int, *, resident: bool) -> BlockMemory:
        dit, step_bytes = self._bundle.manifest.spec.dit, self._layout(component).step_bytes
        choice = BlockChoice(dit.layers, SLICES[0]) if resident else BlockChoice(least_slots(dit), SLICES[-1])
        return block_memory(dit, component.precision, count, choice, step_bytes)

    def _chooser(self, component: Component) -> Callable[[int], BlockChoice]:
        dit, step_bytes = self._bundle.manifest.spec.dit, self._layout(component).step_bytes

        def choose(count: int) -> BlockChoice:
            options, available = self._options, self._available()
            budget = available if options.vram is None else options.vram
            found = choose_blocks(dit, component.precision, count, step_bytes, budget, options.weights_in)
            if found is None:
                least = smallest_budget(dit, component.precision, count, step_bytes, options.weights_in)
                asked = f"--vram {human_bytes(budget)}" if options.vram is not None else f"{human_bytes(budget)} free"
                remedy = "use --weights-in auto" if options.weights_in == "vram" else "use a smaller --size"
                raise UserError(f"{asked} for {component.name}", f"at least {human_bytes(least)}", remedy)
            return found

        return choose
