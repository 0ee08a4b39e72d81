"""From a prompt to frames: the engines of one bundle, opened when they are needed and called in order."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runtime.arrays import F32
from runtime.built_for import check_video, completed, default_video
from runtime.denoise import Conditions, Step, denoise
from runtime.engine import Arrays, BorrowedEngine, Engine
from runtime.forward_inputs import text_rows
from runtime.image_condition import conditioning_video, fit_image, i2v_condition
from runtime.request import CompleteRequest, Request
from runtime.solver import make_solver
from runtime.tokenizer import TokenIds, Tokenizer
from runtime.vae import decode, encode
from wan22.backends import MODULES
from wan22.bundle import Bundle, Component, open_bundle
from wan22.errors import UserError
from wan22.memory import available_host_bytes
from wan22.quantities import human_bytes
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
from wan22.specs import TEXT_TOKENS, ModelSpec, Precision

log = logging.getLogger(__name__)

NewEngine = Callable[[Component], Engine]


class Pipeline:
    """A model ready to generate. Use it as a context manager: engines hold memory until it is left.

    ``residency`` says which engines stay loaded: ``all``; ``one-expert``, where the experts take turns; or
    ``one-component``, where every engine makes room for the next. ``auto`` keeps most of what fits into the memory that
    is free when the pipeline is made, by the figures of :mod:`wan22.memory`, and decides again for every request.
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
    ) -> None:
        """Nothing is loaded yet.

        Args:
            bundle: of kind "engines", or of graphs where ``new_engine`` opens them.
            residency: what stays loaded.
            choices: what ``auto`` may choose from.
            once: for a single run: whatever no later stage of it needs is freed when its work is done.
            tell: is given one line when ``auto`` has chosen.
            new_engine: makes an engine of a component where the bundle's own backend is not to.
        """
        self.bundle, self.once = bundle, once
        self.tokenizer = Tokenizer(bundle.folder / "tokenizer")
        self._shared = ExitStack()  # closed after all engines
        self._backend = _Backend(new_engine, available_host_bytes) if new_engine else _backend(bundle, self._shared)
        self._open: dict[str, ExitStack] = {}
        self._engines: dict[str, Engine] = {}
        self._asked, self._choices, self._tell = residency, choices, tell
        self._residency: Residency | None = None if residency == "auto" else residency
        self._available_bytes = self._backend.available_bytes() if residency == "auto" else math.inf

    @classmethod
    def open(
        cls,
        engines: Path,
        *,
        residency: ResidencyChoice = "auto",
        once: bool = False,
        tell: Callable[[str], None] = log.info,
    ) -> Self:
        """The pipeline of the engine bundle at ``engines``; see :meth:`__init__`.

        Raises:
            UserError: no engine bundle there, or not as its manifest says.
        """
        return cls(open_bundle(engines, "engines"), residency=residency, once=once, tell=tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep_only(())
        self._shared.close()

    @property
    def spec(self) -> ModelSpec:
        return self.bundle.manifest.spec

    # -- engines

    @property
    def residency(self) -> Residency:
        """What stays loaded; before the first request, what would for the video that the bundle makes by default."""
        if self._residency is None:
            needed = self._needed(default_video(self.bundle.manifest))
            self._residency = choose_residency(needed, self._available_bytes) or "one-component"
        return self._residency

    def fit(self, video: Video) -> None:
        """Chooses what stays loaded for ``video`` where that is left to ``auto``, and says so when it changes.

        Raises:
            UserError: no way to keep components fits; says which component does not, and what would.
        """
        if self._asked != "auto":
            return
        needed, available = self._needed(video), self._available_bytes
        found = choose_residency(needed, available)
        if found is None:
            spec, sets = self.spec, self._backend.cache_sets
            fitting = largest_fitting(spec, self._precisions, video, available, cache_sets=sets)
            raise refusal(needed, self._memory(video), available, fitting)
        if found != self._residency:
            self._keep_only(())
            self._residency = found
            self._tell(f"residency {found}: takes {human_bytes(needed[found])} of {human_bytes(available)} free")

    @property
    def _precisions(self) -> dict[str, Precision]:
        return {component.name: component.precision for component in self.bundle.manifest.components}

    def _memory(self, video: Video) -> dict[str, Memory]:
        return engines_memory(self.spec, self._precisions, video, cache_sets=self._backend.cache_sets)

    def _needed(self, video: Video) -> dict[Residency, float]:
        every = needed_bytes(self.spec, self._memory(video))
        return {way: size for way, size in every.items() if way in self._choices or len(self.spec.experts) == 1}

    def engine(self, name: str) -> Engine:
        """The engine of component ``name``, opened on first use. It may close others, see :attr:`residency`."""
        if name not in self._engines:
            if self.residency == "one-component":
                self._keep_only(())
            elif self.residency == "one-expert" and name in self.spec.experts:
                self._keep_only(set(self._engines) - set(self.spec.experts))
            stack = ExitStack()
            self._engines[name] = stack.enter_context(self._backend.new_engine(self.bundle.component(name)))
            self._open[name] = stack
        return self._engines[name]

    def on_call(self, name: str) -> Engine:
        """The engine of component ``name``, which is opened when it is called, and again if it was closed since."""
        return _OnCall(self, name)

    def release(self, name: str) -> None:
        """Frees the engine of component ``name`` if it is open."""
        if name in self._open:
            del self._engines[name]
            self._open.pop(name).close()

    def _keep_only(self, names: Collection[str]) -> None:
        for name in set(self._open) - set(names):
            self.release(name)

    def _begin(self, *names: str) -> None:
        """A stage that needs these engines; in a single run nothing else is needed any more until it ends."""
        if self.once:
            self._keep_only(names)

    # -- stages

    def complete(self, request: Request) -> CompleteRequest:
        """:func:`runtime.built_for.completed` for the bundle of this pipeline."""
        return completed(request, self.bundle.manifest)

    def encode_text(self, prompt: str, *, allow_empty: bool = False) -> tuple[TokenIds, F32]:
        """Token ids and their embeddings, float32 ``[1, tokens, text width]``; warns when the prompt was cut."""
        tokens = self.tokenizer.encode(prompt, allow_empty=allow_empty)
        if tokens.truncated:
            log.warning("prompt cut to %d tokens", TEXT_TOKENS)  # prompts of others do not belong into logs
        return tokens, _single(self.engine("text_encoder")(input_ids=tokens.ids))

    def text(self, prompt: str, *, allow_empty: bool = False) -> F32:
        """The embeddings as the transformer takes them: ``[1, 512, text width]``, rows after the end exact zeros.

        It cannot be written to.
        """
        _, embeddings = self.encode_text(prompt, allow_empty=allow_empty)
        padded = text_rows(embeddings)
        padded.flags.writeable = False  # engines may keep what follows from it alone
        return padded

    def image_condition(self, request: CompleteRequest) -> dict[str, F32]:
        """What the sampler is given of the request's images: ``condition`` (I2V), ``first_frame`` (TI2V) or nothing."""
        if request.image is None:
            return {}
        self._begin("vae_encoder_first", "vae_encoder_next")
        size = (request.width, request.height)
        first = fit_image(request.image, self.spec.takes.resizing, size, request.fit)
        if self.spec.takes.clean_first_frame:
            return {"first_frame": encode(self.on_call("vae_encoder_first"), None, first)}
        has_last = request.last_image is not None
        last = (
            fit_image(request.last_image, self.spec.takes.resizing, size, request.fit) if request.last_image else None
        )
        video = conditioning_video(first, request.frames, last)
        following = self.on_call("vae_encoder_next") if request.frames > 1 else None
        latents = encode(self.on_call("vae_encoder_first"), following, video)
        return {"condition": i2v_condition(latents, has_last=has_last)}

    def denoise(self, request: CompleteRequest) -> Iterator[Step]:
        """Runs the sampler, yielding after every step; the last step carries the clean latents.

        Raises:
            UserError: before any work, a video that the engines were not built for or that does not fit into memory.
        """
        check_video(self.bundle.manifest, request.video)
        self.fit(request.video)
        positive = self.text(request.prompt)
        negative = self.text(request.negative_prompt, allow_empty=True) if request.guided else None
        schedule = request.noise_schedule()
        given = Conditions(positive, negative, **self.image_condition(request))
        self._begin(*self.spec.experts)
        solver = make_solver(request.solver, schedule, request.seed)
        spec = request.switched(self.spec)
        yield from denoise(spec, self.engine, request.initial_noise(), given, request.guidance, schedule, solver)

    def decode(self, latents: F32) -> Iterator[F32]:
        """Frames ``[1, 3, f, H, W]`` in [-1, 1] of clean latents ``[1, z, T, h, w]``, one latent frame at a time."""
        self._begin("vae_decoder_first", "vae_decoder_next")
        following = self.on_call("vae_decoder_next") if latents.shape[2] > 1 else None
        yield from decode(self.on_call("vae_decoder_first"), following, latents)


def _single(outputs: np.ndarray | tuple[np.ndarray, ...]) -> F32:
    assert isinstance(outputs, np.ndarray)
    return outputs


class _OnCall(BorrowedEngine):
    """An engine of ``pipeline`` that is opened no earlier than it is called."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        component = pipeline.bundle.component(name)
        self._pipeline, self._name = pipeline, name
        self.inputs, self.outputs = component.inputs, component.outputs

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        return self._pipeline.engine(self._name)(**inputs)


@dataclass(frozen=True)
class _Backend:
    new_engine: NewEngine
    available_bytes: Callable[[], float]  # where its engines keep their weights
    cache_sets: int = 1  # of a VAE during a call: ONNX Runtime writes new caches over the old ones


def _backend(bundle: Bundle, stack: ExitStack) -> _Backend:
    """How engines of ``bundle`` are made; what they share is opened on ``stack``.

    Raises:
        UserError: a backend that this version does not know, that is not installed, or that finds no fitting GPU.
    """
    folder, build = bundle.folder, bundle.manifest.build
    if build is None or build.backend not in MODULES:
        found = build.backend if build else None
        raise UserError(f"{folder}: backend {found!r}", f"one of {', '.join(MODULES)}", "build it again")
    profiles = build.profiles
    if build.backend == "onnxruntime":
        from runtime.engine_onnxruntime import OnnxRuntimeEngine

        return _Backend(lambda component: OnnxRuntimeEngine(folder, component, profiles), available_host_bytes)
    from runtime.engine_tensorrt import Device

    device = stack.enter_context(Device.open(bundle.manifest))
    return _Backend(lambda component: device.engine(folder, component, profiles), device.available_bytes, cache_sets=2)
