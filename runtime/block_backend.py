"""Components in stages for a pipeline: where their weights are, the memory that they take, and on which devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from runtime.block_forward import StageDevice
from runtime.block_stream import NOTHING, Streamed
from runtime.block_text_encoder import BlockTextEncoder
from runtime.block_transformer import BlockTransformer, SharedBlocks
from runtime.group import Link
from wan22.block_layout import BlockLayout, Overlay, read_block_layout, read_overlay, size_bytes
from wan22.block_memory import (
    BlockChoice,
    BlockStack,
    WeightsIn,
    text_layers,
    transformer_blocks,
)
from wan22.bundle import Bundle, overwriting
from wan22.component import Component, File
from wan22.errors import UserError
from wan22.parallel import LARGEST_GROUP, ONE_DEVICE, Devices, choose_devices
from wan22.quantities import human_bytes, size_option
from wan22.residency import Memory, Video
from wan22.shapes import Profile
from wan22.specs import tokens

TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class BlockOptions:
    weights_in: WeightsIn = "auto"
    vram: float | None = None  # the most bytes of engines that stay loaded, or of the one at work; None: what is free
    vae_strips: int | None = None  # strips in which a VAE takes pictures; None: whole if it fits, else what fits
    gpus: str | None = None  # the devices, as "0,1"; None: the first
    parallel: str | None = None  # how they divide the work, see :func:`wan22.parallel.parse_split`

    @property
    def of_blocks(self) -> "BlockOptions":
        """Those that only components in blocks have."""
        return BlockOptions(self.weights_in, self.vram)


BLOCKS_AS_FIT = BlockOptions()


def check_options(bundle: Bundle, options: BlockOptions) -> Devices:
    """Refuse options that the engines of ``bundle`` cannot follow; the devices that they name."""
    in_blocks = any(component.in_blocks for component in bundle.manifest.components)
    if options.of_blocks != BLOCKS_AS_FIT and not in_blocks:
        given = (("--weights-in", options.weights_in != "auto"), ("--vram", options.vram is not None))
        named = " and ".join(name for name, is_given in given if is_given)
        remedy = f"leave {named} out, or run wan-trt build --topology blocks"
        raise UserError(f"{named} for whole engines, {bundle.folder}", "engines in blocks", remedy)
    asked, most, build = options.vae_strips, most_strips(bundle), bundle.manifest.build
    vae = [component for component in bundle.manifest.components if component.name.startswith("vae")]
    if asked is not None and not any(component.stages for component in vae):
        again = "run wan-trt build --vae-strips" if build and build.profiles else "export and build again"
        raise UserError(f"--vae-strips for {bundle.folder}", "engines of a VAE in stages", again)
    if asked is not None and most is not None and asked > most:
        remedy = f"use --vae-strips {most}, or build with --vae-strips {asked}"
        raise UserError(f"--vae-strips {asked}", f"1 to {most}, which the engines were built for", remedy)
    return devices_of(bundle, options)


def devices_of(bundle: Bundle, options: BlockOptions) -> Devices:
    """The devices for the engines of ``bundle``.

    Raises:
        UserError: they are malformed or too few, or the engines cannot divide the work so.
    """
    if options.gpus is None and options.parallel is None:
        return ONE_DEVICE
    spec, components = bundle.manifest.spec, bundle.manifest.components
    groups = tuple(count for c in components if c.name == spec.experts[0] and c.in_blocks for count in c.groups)
    in_strips = any(c.name.startswith("vae_decoder") and c.stages for c in components)
    most = (most_strips(bundle) or LARGEST_GROUP) if in_strips else 0
    devices = choose_devices(spec, options.gpus, options.parallel, groups, most)
    split = devices.split
    if any(split.ulysses in component.older_groups for component in components):
        found = f"--parallel {split} for {bundle.folder}, whose stages for it are an older version's"
        raise UserError(
            found, "those of this version", f"export and build again: {overwriting(bundle.manifest.command)}"
        )
    if split.ulysses > 1 and split.ulysses not in groups:
        found, asked = f"--parallel {split} for {bundle.folder}", f"--parallel ulysses{split.ulysses}"
        raise UserError(found, f"engines built for {split.ulysses} devices", f"run wan-trt build {asked}")
    if split.vae > max(1, most):
        found, remedy = f"--parallel {split} for {bundle.folder}", f"build with --vae-strips {split.vae}"
        raise UserError(found, f"engines of a VAE in {split.vae} strips", f"{remedy}, or leave vae{split.vae} out")
    if split.vae > 1 and options.vae_strips is not None and options.vae_strips < split.vae:
        found = f"--vae-strips {options.vae_strips} for --parallel {split}"
        raise UserError(found, f"at least {split.vae}, one for each device", "leave --vae-strips out")
    return devices


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
        self.link: Link | None = None  # to the other devices that divide the tokens; set before engines are made
        self.component: Callable[[str], Component] = bundle.component  # with the weights in use; may be replaced

    def applies_to(self, name: str) -> bool:
        return name in {component.name for component in self._in_blocks}

    def engine(self, component: Component, profiles: Sequence[Profile]) -> BlockTransformer | BlockTextEncoder:
        spec = self._bundle.manifest.spec
        alike, key = self._alike(component), self._key(component)
        if key not in self._shared:
            layout = self._layout(component)
            choose = partial(self._choose, component)
            link = self.link if component.name != TEXT_ENCODER else None
            self._shared[key] = SharedBlocks(self._device(alike, layout), layout, choose, link)
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
        count, self._others_bytes = self._own_tokens(video), others_bytes
        for component in self._in_blocks:
            self._choose(component, count)

    def memory(self, name: str, video: Video, *, resident: bool) -> Memory:
        """The memory of a component, all of its blocks ``resident`` or as few as possible."""
        component = self._bundle.component(name)
        stack = self._stack(component, self._own_tokens(video))
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
        """The blocks of ``component`` for ``count`` tokens of this device."""
        spec, layout = self._bundle.manifest.spec, self._layout(component)
        if component.name == TEXT_ENCODER:
            return text_layers(spec.text_encoder, component.precision, layout.step_bytes)
        groups, beside = self._groups, bool(layout.lora_rank) + bool(component.low_rank)
        return transformer_blocks(
            spec.dit, component.precision, count * groups, layout.step_bytes, groups, beside=beside
        )

    @property
    def _groups(self) -> int:
        return 1 if self.link is None else self.link.size

    def _own_tokens(self, video: Video) -> int:
        """The most tokens of ``video`` that this device has."""
        return -(-tokens(self._bundle.manifest.spec.latent_shape(*video)) // self._groups)

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
