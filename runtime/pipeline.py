"""From a prompt to frames: open the engines of one bundle on demand and call them in order."""

import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from runtime.arrays import F32
from runtime.backend import Backend, NewEngine, open_backend
from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions, check_options
from runtime.block_stream import Streamed
from runtime.built_for import check_video, default_video, fill_defaults
from runtime.denoise import Conditions, Step, denoise
from runtime.engine import Engine, OnCall
from runtime.forward_inputs import text_rows
from runtime.image_condition import condition_inputs
from runtime.request import CompleteRequest, Request
from runtime.tokenizer import TokenIds, Tokenizer
from runtime.vae_choice import PipelineVae
from runtime.weight_sets import WeightSets, check_lora
from wan22.bundle import Bundle, open_bundle
from wan22.component import Component
from wan22.memory import available_host_bytes
from wan22.quantities import counted, human_bytes
from wan22.residency import (
    RESIDENCIES,
    Memory,
    Residency,
    ResidencyChoice,
    Video,
    choose_residency,
    engines_memory,
    largest_fitting,
    needed_bytes,
    refusal,
)
from wan22.specs import TEXT_TOKENS, ModelSpec
from wan22.strips import half_of

log = logging.getLogger(__name__)


class Pipeline:
    """A model ready to generate. Use it as a context manager, which frees the engines at the end.

    ``residency`` determines which engines stay loaded: ``all``; ``one-expert``, where the experts take turns; or
    ``one-component``, where only one engine is loaded at a time. ``auto`` keeps as many as fit into the memory that is
    free when the pipeline is created, by the figures of :mod:`wan22.residency`, and decides again for every request.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        residency: ResidencyChoice = "auto",
        choices: Sequence[Residency] = RESIDENCIES,
        once: bool = False,
        tell: Callable[[str], None] = log.info,
        new_engine: NewEngine | None = None,
        blocks: BlockOptions = BLOCKS_AS_FIT,
    ) -> None:
        """Create the pipeline without loading anything.

        Args:
            bundle: a bundle of kind "engines", or of graphs if ``new_engine`` can open them.
            residency: the engines that stay loaded.
            choices: the residencies that ``auto`` may choose.
            once: for a single run: free each engine as soon as no later stage needs it.
            tell: receives one line for each choice of ``auto``.
            new_engine: makes the engine of a component, instead of the bundle's backend.
            blocks: where the weights of transformers in stages are, how the VAE takes pictures, and the devices.
        """
        devices = check_options(bundle, BLOCKS_AS_FIT if new_engine else blocks)
        self.bundle = bundle = bundle.in_groups(devices.split.ulysses)
        self.once, self.split = once, devices.split
        self.weight_sets = WeightSets(bundle, {})  # may be replaced before the first request
        self.tokenizer = Tokenizer(bundle.folder / "tokenizer")
        self._shared = ExitStack()  # closed after all engines
        of_others = Backend(new_engine, available_host_bytes) if new_engine else None
        self.backend = of_others or open_backend(bundle, self._shared, blocks, devices, tell)
        for in_blocks in self.backend.every_blocks:
            in_blocks.component = self._component
        self._open, self._engines = dict[str, ExitStack](), dict[str, Engine]()
        self._precisions = {component.name: component.precision for component in bundle.manifest.components}
        self._asked, self._choices, self._tell = residency, choices, tell
        self._residency: Residency | None = None if residency == "auto" else residency
        self._available_bytes = self.backend.available_bytes() if residency == "auto" else math.inf
        free = math.inf if new_engine else self._available_bytes  # engines of others are whole
        self._most_bytes = blocks.vram or math.inf  # of engines that stay loaded
        self._vae = PipelineVae(bundle, blocks, free, self.backend.cache_sets, (self.split.vae, self.backend.spread))

    @classmethod
    def open(
        cls,
        engines: Path,
        *,
        residency: ResidencyChoice = "auto",
        once: bool = False,
        tell: Callable[[str], None] = log.info,
        blocks: BlockOptions = BLOCKS_AS_FIT,
    ) -> Self:
        """The pipeline of the engine bundle at ``engines``; see :meth:`__init__`.

        Raises:
            UserError: there is no engine bundle, or it differs from its manifest.
        """
        return cls(open_bundle(engines, "engines"), residency=residency, once=once, tell=tell, blocks=blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep_only(())
        self._shared.close()

    @property
    def spec(self) -> ModelSpec:
        return self.bundle.manifest.spec

    @property
    def streamed(self) -> Streamed | None:
        """What transformers in blocks have copied so far, to the first device; None for whole engines."""
        return self.backend.blocks.streamed if self.backend.blocks is not None else None

    @property
    def residency(self) -> Residency:
        """The engines that stay loaded; before the first request, the choice for the bundle's default video."""
        if self._residency is None:
            needed = self._needed(default_video(self.bundle.manifest))
            self._residency = choose_residency(needed, min(self._available_bytes, self._most_bytes)) or "one-component"
        return self._residency

    def fit(self, video: Video) -> None:
        """With ``auto``, choose the residency for ``video``, and report a change of it.

        Raises:
            UserError: no residency fits; names the component that does not, and a video that would fit.
        """
        if self.backend.blocks is not None:
            self.backend.blocks.check(video, self._vae.least_bytes(video))
        for half, count in self._vae.chosen(video).items():
            self._tell(f"{half} in {counted(count, 'strip')}")
        if self._asked != "auto":
            return
        needed, available = self._needed(video), self._available_bytes
        kept = min(available, self._most_bytes)
        found = choose_residency(needed, kept) or choose_residency(dict([*needed.items()][-1:]), available)
        if found is None:
            fitting = largest_fitting(self.spec, self._precisions, video, available, memory_of=self._memory)
            raise refusal(needed, self._memory(video), available, fitting)
        if found != self._residency:
            self._keep_only(())
            self._residency = found
            self._tell(f"residency {found}: needs {human_bytes(needed[found])} of {human_bytes(kept)}")

    def _memory(self, video: Video, *, resident: bool = False) -> dict[str, Memory]:
        """The engines' memory; of transformers in stages with all blocks ``resident`` or as few as possible."""
        sets, strips = self.backend.cache_sets, self._vae.chosen(video)
        rank = max(component.low_rank for component in self.bundle.manifest.components)
        found = engines_memory(self.spec, self._precisions, video, cache_sets=sets, vae_strips=strips, low_rank=rank)
        if (blocks := self.backend.blocks) is not None:
            in_stages = [name for name in found if blocks.applies_to(name)]
            found |= {name: blocks.memory(name, video, resident=resident) for name in in_stages}
        return found

    def _needed(self, video: Video) -> dict[Residency, float]:
        every = needed_bytes(self.spec, self._memory(video, resident=True))
        if self.split.experts > 1:  # every device has one
            every["all"] = every.pop("one-expert")
        every["one-component"] = needed_bytes(self.spec, self._memory(video))["one-component"]
        return {way: size for way, size in every.items() if way in self._choices or len(self.spec.experts) == 1}

    def engine(self, name: str) -> Engine:
        """The engine of component ``name``, opened on first use. Opening may close others, see :attr:`residency`."""
        if name not in self._engines:
            if self.residency == "one-component":
                self._keep_only(self._sharing(name))
            elif self.residency == "one-expert" and name in self.spec.experts:
                self._keep_only(set(self._engines) - set(self.spec.experts) | self._sharing(name))
            stack = ExitStack()
            self._engines[name] = stack.enter_context(self.backend.new_engine(self._component(name)))
            self._open[name] = stack
        return self._engines[name]

    def _component(self, name: str) -> Component:
        """Component ``name`` with the weights of the set in use, or a stage of one: "vae_decoder_first.fine"."""
        whole, _, stage = name.partition(".")
        return self.weight_sets.component(whole).part(stage) if stage else self.weight_sets.component(whole)

    def _sharing(self, name: str) -> set[str]:
        """The engines that stay beside ``name``: experts in the same stages stream past, those of a VAE take turns."""
        if "." in name:
            return {other for other in self._engines if "." in other and half_of(other) == half_of(name)}
        stages = self.bundle.component(name).stages if self.backend.blocks else ()
        return {c.name for c in self.bundle.manifest.components if stages and c.stages == stages}

    def on_call(self, name: str) -> Engine:
        """An engine of component ``name`` that is opened when called, and again if it was closed since."""
        if self.split.vae > 1:
            return self.engine(name)  # no device could open it on all of them
        component = self._component(name)
        return OnCall(component.inputs, component.outputs, lambda: self.engine(name))

    def load(self, name: str) -> None:
        """Open the engine of component ``name``, or the engines of its stages."""
        for engine in self._vae.engines(name):
            self.engine(engine)

    def release(self, name: str) -> None:
        """Free the engine of component ``name`` if it is open, or those of its stages."""
        for stage in [other for other in self._open if other.startswith(f"{name}.")]:
            self.release(stage)
        if name in self._open:
            del self._engines[name]
            self._open.pop(name).close()

    def _keep_only(self, names: Collection[str]) -> None:
        for name in set(self._open) - set(names):
            self.release(name)

    def use_weights(self, lora: str | None) -> bool:
        """Take the experts from the set ``lora``; True if it was another. Closes them, unless one device has slots."""
        changed, every = self.weight_sets.choose(lora), self.backend.every_blocks
        if changed and self.weight_sets.rank and len(every) == 1:
            every[0].renew()
        elif changed:
            self._keep_only(set(self._open) - set(self.spec.experts))
        return changed

    def _begin(self, *names: str) -> None:
        """Begin a stage that needs only the engines ``names``; a single run closes the others."""
        if self.once:
            self._keep_only(names)

    def complete(self, request: Request) -> CompleteRequest:
        """:func:`runtime.built_for.fill_defaults` for the bundle of this pipeline."""
        check_lora(request.lora, self.weight_sets.names)
        return fill_defaults(request, self.bundle.manifest)

    def encode_text(self, prompt: str, *, allow_empty: bool = False) -> tuple[TokenIds, F32]:
        """Token ids and their embeddings, float32 ``[1, tokens, text width]``; warns if the prompt is cut."""
        tokens = self.tokenizer.encode(prompt, allow_empty=allow_empty)
        if tokens.truncated:
            log.warning("prompt cut to %d tokens", TEXT_TOKENS)  # users' prompts do not belong in logs
        return tokens, np.asarray(self.engine("text_encoder")(input_ids=tokens.ids))

    def text(self, prompt: str, *, allow_empty: bool = False) -> F32:
        """The transformer's text input, read-only: ``[1, 512, text width]``, with exact zeros after the last token."""
        _, embeddings = self.encode_text(prompt, allow_empty=allow_empty)
        padded = text_rows(embeddings)
        padded.flags.writeable = False  # so engines may cache results that depend on it alone
        return padded

    def image_condition(self, request: CompleteRequest) -> dict[str, F32]:
        """The sampler's inputs from the request's images: see :func:`runtime.image_condition.condition_inputs`."""
        images = request.image, request.last_image
        video = (request.width, request.height, request.frames)
        return condition_inputs(self.spec, images, video, request.fit, self.encode)

    def denoise(self, request: CompleteRequest, steps: range | None = None) -> Generator[Step, F32 | None, None]:
        """Run the sampler and yield after every step; the last step carries the clean latents.

        Latents that the caller sends replace those of the step. ``steps`` limits the run to a part, for which the
        request's noise is the latents before its first step.

        Raises:
            UserError: before any work, if the engines were not built for the video or it does not fit into memory.
        """
        check_video(self.bundle.manifest, request.video)
        self.use_weights(request.lora)
        self.fit(request.video)
        if self.split.cfg > 1 and not request.guided:
            self._tell("guidance is 1, so half of the devices have nothing to do: cfg2 divides two prompts")
        positive = self.text(request.prompt)
        negative = self.text(request.negative_prompt, allow_empty=True) if request.guided else None
        given = Conditions(positive, negative, **self.image_condition(request))
        self._begin(*self.spec.experts)
        whole = request.with_switch(self.spec), request.sampler(self.spec)
        spec, sampler = whole if steps is None else request.part(self.spec, steps)
        yield from denoise(spec, self.engine, request.initial_noise(), given, sampler)

    def encode(self, frames: F32) -> F32:
        """Encode frames ``[1, 3, F, H, W]`` into normalised latents ``[1, z, T, h, w]``."""
        self._begin(*(name for name in self._engines if name.startswith("vae_encoder")))
        return self._vae.encode(frames, self.on_call)

    def decode(self, latents: F32) -> Iterator[F32]:
        """Decode clean latents ``[1, z, T, h, w]`` into frames ``[1, 3, f, H, W]`` in [-1, 1], per latent frame."""
        self._begin(*(name for name in self._engines if name.startswith("vae_decoder")))
        yield from self._vae.decode(latents, self.on_call)
