"""Components in stages for a pipeline: where their weights are, and the memory that they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from runtime.block_forward import StageDevice
from runtime.block_stream import NOTHING, Streamed
from runtime.block_text_encoder import BlockTextEncoder
from runtime.block_transformer import BlockTransformer, SharedBlocks
from wan22.block_layout import BlockLayout, Overlay, read_block_layout, read_overlay, size_bytes
from wan22.block_memory import (
    BlockChoice,
    BlockStack,
    WeightsIn,
    text_layers,
    transformer_blocks,
)
from wan22.bundle import Bundle, Component, File
from wan22.errors import UserError
from wan22.quantities import human_bytes, size_option
from wan22.residency import Memory, Video
from wan22.shapes import Profile
from wan22.specs import tokens

TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class BlockOptions:
    weights_in: WeightsIn = "auto"
    vram: float | None = None  # the most bytes for a transformer, text encoder or VAE, each; None: what is free
    vae_strips: int | None = None  # strips in which a VAE takes pictures; None: whole if it fits, else what fits

    @property
    def of_blocks(self) -> "BlockOptions":
        """Those that only components in blocks have."""
        return replace(self, vae_strips=None)


BLOCKS_AS_FIT = BlockOptions()


def check_options(bundle: Bundle, options: BlockOptions) -> None:
    """Refuse options that the engines of ``bundle`` cannot follow."""
    in_blocks = any(component.in_blocks for component in bundle.manifest.components)
    if options.of_blocks != BLOCKS_AS_FIT and not in_blocks:
        remedy = "leave --weights-in and --vram out, or run wan-trt build --topology blocks"
        raise UserError(f"--weights-in or --vram for {bundle.folder}", "engines in blocks", remedy)
    asked, most, build = options.vae_strips, most_strips(bundle), bundle.manifest.build
    vae = [component for component in bundle.manifest.components if component.name.startswith("vae")]
    if asked is not None and not any(component.stages for component in vae):
        again = "run wan-trt build --vae-strips" if build and build.profiles else "export and build again"
        raise UserError(f"--vae-strips for {bundle.folder}", "engines of a VAE in stages", again)
    if asked is not None and most is not None and asked > most:
        remedy = f"use --vae-strips {most}, or build with --vae-strips {asked}"
        raise UserError(f"--vae-strips {asked}", f"1 to {most}, which the engines were built for", remedy)


def most_strips(bundle: Bundle) -> int | None:
    """The most strips that the VAE's engines were built for; None for any number."""
    build = bundle.manifest.build
    return int(build.options["vae_strips"]) if build is not None and "vae_strips" in build.options else None


class BlockBackend:
    """The components of ``bundle`` in stages. Those with the same stages share a device and its slots."""

    def __init__(
        self,
        bundle: Bundle,
        options: BlockOptions,
        device: Callable[[tuple[Component, ...], BlockLayout], StageDevice],
        available_bytes: Callable[[], float],
    ) -> None:
        """``device`` makes the device for components with the same stages; ``available_bytes`` is what is free."""
        self._bundle, self._options, self._available = bundle, options, available_bytes
        self._layouts: dict[File, BlockLayout] = {}
        self._device, self._shared = device, dict[tuple[str, ...], SharedBlocks]()
        self._others_bytes = 0.0
        self.component: Callable[[str], Component] = bundle.component  # with the weights in use; may be replaced

    def applies_to(self, name: str) -> bool:
        return name in {component.name for component in self._in_blocks}

    def engine(self, component: Component, profiles: Sequence[Profile]) -> BlockTransformer | BlockTextEncoder:
        spec = self._bundle.manifest.spec
        alike, key = self._alike(component), self._key(component)
        if key not in self._shared:
            layout = self._layout(component)
            choose = partial(self._choose, component)
            self._shared[key] = SharedBlocks(self._device(alike, layout), layout, choose)
        self.renew()
        if component.name == TEXT_ENCODER:
            return BlockTextEncoder(self._shared[key], component, profiles)
        return BlockTransformer(self._shared[key], spec.dit, component, profiles)

    def _alike(self, component: Component) -> tuple[Component, ...]:
        """The components with the stages of ``component``, which share a device, with the weights in use."""
        return tuple(self.component(c.name) for c in self._in_blocks if c.stages == component.stages)

    def _key(self, component: Component) -> tuple[str, ...]:
        return tuple(each.weights[1].path for each in self._alike(component))

    def renew(self) -> None:
        """Take the weights in use from now on, where they differ by overlays from those of before."""
        for component in map(self.component, (each.name for each in self._in_blocks)):
            if (shared := self._shared.get(self._key(component))) is not None:
                shared.use(component.name, self._overlay(component))

    def _overlay(self, component: Component) -> tuple[Path, Overlay] | None:
        """The file that replaces parts of the weights of ``component``."""
        if len(component.weights) < 4:
            return None
        layout, file = (self._bundle.path(each) for each in component.weights[2:])
        return file, read_overlay(layout)

    @property
    def streamed(self) -> Streamed:
        """What all components have copied so far."""
        return sum((shared.streamed for shared in self._shared.values()), NOTHING)

    def check(self, video: Video, others_bytes: float) -> None:
        """Refuse a video that does not fit, before anything is loaded; other components need ``others_bytes``.

        Raises:
            UserError: names the smallest budget that works.
        """
        count, self._others_bytes = tokens(self._bundle.manifest.spec.latent_shape(*video)), others_bytes
        for component in self._in_blocks:
            self._choose(component, count)

    def memory(self, name: str, video: Video, *, resident: bool) -> Memory:
        """The memory of a component, all of its blocks ``resident`` or as few as possible."""
        component, spec = self._bundle.component(name), self._bundle.manifest.spec
        stack = self._stack(component, tokens(spec.latent_shape(*video)))
        found = stack.memory(stack.most if resident else stack.least)
        slots = found.slots if name == self._first[component.stages[0].graph.path] else 0.0
        return Memory(name, slots + found.text, found.x + found.edges + found.scratch, 0.0)

    @cached_property
    def _in_blocks(self) -> tuple[Component, ...]:
        return tuple(component for component in self._bundle.manifest.components if component.in_blocks)

    @cached_property
    def _first(self) -> dict[str, str]:
        """By stages, the expert that counts for the slots that all of them share."""
        found: dict[str, str] = {}
        for component in self._in_blocks:
            found.setdefault(component.stages[0].graph.path, component.name)
        return found

    def _layout(self, component: Component) -> BlockLayout:
        """The layout of the weights of ``component``.

        Raises:
            UserError: it is not that of the stages, as of weights of another model or precision.
        """
        stored, file = component.weights[:2]
        if (known := self._layouts.get(stored)) is not None:
            return known
        layout = read_block_layout(self._bundle.path(stored))
        places = {place.name: place.size_bytes for place in (*layout.ends, *layout.block)}
        for tensor in (tensor for stage in component.stages for tensor in stage.weights):
            if (found := places.get(tensor.name, 0)) != size_bytes(tensor):
                given = f"{file.path}: {tensor.name} of {found} bytes"
                expected = f"{size_bytes(tensor)} bytes, as the engines of {component.name} take"
                raise UserError(given, expected, f"build again: {self._bundle.manifest.command}")
        if file.size_bytes != layout.size_bytes:
            given = f"{file.path}: {file.size_bytes} bytes"
            raise UserError(given, f"{layout.size_bytes} by its layout", "run wan-trt build again")
        self._layouts[stored] = layout
        return layout

    def _stack(self, component: Component, count: int) -> BlockStack:
        """The blocks of ``component`` for a video of ``count`` tokens."""
        spec, layout = self._bundle.manifest.spec, self._layout(component)
        if component.name == TEXT_ENCODER:
            return text_layers(spec.text_encoder, component.precision, layout.step_bytes)
        slots = bool(layout.lora_rank)
        return transformer_blocks(spec.dit, component.precision, count, layout.step_bytes, slots=slots)

    def _choose(self, component: Component, count: int) -> BlockChoice:
        options, available = self._options, self._available()
        budget = available if options.vram is None else options.vram
        found = self._stack(component, count).choose(budget, options.weights_in)
        if found is not None:
            return found
        each = (self._stack(each, count).smallest_budget(options.weights_in) for each in self._in_blocks)
        least = max(self._others_bytes, *each)
        remedy = "use --weights-in auto" if options.weights_in == "vram" else "use a smaller --size"
        if options.vram is None:
            asked = f"{human_bytes(budget)} free"
        else:
            asked, remedy = f"--vram {human_bytes(budget)}", f"give --vram {size_option(least)}, or {remedy}"
        raise UserError(f"{asked} for {component.name}", f"at least {size_option(least)}", remedy)
