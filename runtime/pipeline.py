"""From a prompt to frames: the engines of one bundle, opened when they are needed and called in order."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runtime.arrays import F32
from runtime.denoise import Conditions, Step, denoise
from runtime.engine import Engine
from runtime.forward_inputs import text_rows
from runtime.image_condition import conditioning_video, fit_image, i2v_condition
from runtime.noise import standard_normal
from runtime.request import CompleteRequest
from runtime.solver import make_solver
from runtime.tokenizer import TokenIds, Tokenizer
from runtime.vae import decode, encode
from wan22.backends import MODULES
from wan22.bundle import Bundle, Component, open_bundle
from wan22.errors import UserError
from wan22.specs import TEXT_TOKENS, ModelSpec

log = logging.getLogger(__name__)

NewEngine = Callable[[Component], Engine]


class Pipeline:
    """A model ready to generate. Use it as a context manager: engines hold memory until it is left.

    One expert is resident at a time unless ``keep_experts``; the text encoder and VAE stay once opened.
    """

    def __init__(self, bundle: Bundle, *, keep_experts: bool = True, new_engine: NewEngine | None = None) -> None:
        """``new_engine`` makes an engine of a component where the bundle's own backend is not to."""
        self.bundle, self.keep_experts = bundle, keep_experts
        self.tokenizer = Tokenizer(bundle.folder / "tokenizer")
        self._shared = ExitStack()  # closed after all engines
        self._new_engine = new_engine or _opener(bundle, self._shared)
        self._open: dict[str, ExitStack] = {}
        self._engines: dict[str, Engine] = {}

    @classmethod
    def open(cls, engines: Path, *, keep_experts: bool = True) -> Self:
        """The pipeline of the engine bundle at ``engines``.

        Raises:
            UserError: no engine bundle there, or not as its manifest says.
        """
        return cls(open_bundle(engines, "engines"), keep_experts=keep_experts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in tuple(self._open):
            self.release(name)
        self._shared.close()

    @property
    def spec(self) -> ModelSpec:
        return self.bundle.manifest.spec

    # -- engines

    def engine(self, name: str) -> Engine:
        """The engine of component ``name``, opened on first use."""
        if name not in self._engines:
            if name in self.spec.experts and not self.keep_experts:
                for other in self.spec.experts:
                    self.release(other)
            stack = ExitStack()
            self._engines[name] = stack.enter_context(self._new_engine(self.bundle.component(name)))
            self._open[name] = stack
        return self._engines[name]

    def release(self, name: str) -> None:
        """Frees the engine of component ``name`` if it is open."""
        if name in self._open:
            del self._engines[name]
            self._open.pop(name).close()

    # -- stages

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
        size = (request.width, request.height)
        first = fit_image(request.image, self.spec.takes.resizing, size, request.fit)
        if self.spec.takes.clean_first_frame:
            return {"first_frame": encode(self.engine("vae_encoder_first"), None, first)}
        has_last = request.last_image is not None
        last = (
            fit_image(request.last_image, self.spec.takes.resizing, size, request.fit) if request.last_image else None
        )
        video = conditioning_video(first, request.frames, last)
        following = self.engine("vae_encoder_next") if request.frames > 1 else None
        latents = encode(self.engine("vae_encoder_first"), following, video)
        return {"condition": i2v_condition(latents, has_last=has_last)}

    def denoise(self, request: CompleteRequest) -> Iterator[Step]:
        """Runs the sampler, yielding after every step; the last step carries the clean latents."""
        positive = self.text(request.prompt)
        negative = self.text(request.negative_prompt, allow_empty=True) if request.guided else None
        schedule = request.noise_schedule()
        yield from denoise(
            request.switched(self.spec),
            self.engine,
            standard_normal(request.latent_shape, request.seed),
            Conditions(positive, negative, **self.image_condition(request)),
            request.guidance,
            schedule,
            make_solver(request.solver, schedule, request.seed),
        )

    def decode(self, latents: F32) -> Iterator[F32]:
        """Frames ``[1, 3, f, H, W]`` in [-1, 1] of clean latents ``[1, z, T, h, w]``, one latent frame at a time."""
        more = latents.shape[2] > 1
        following = self.engine("vae_decoder_next") if more else None
        yield from decode(self.engine("vae_decoder_first"), following, latents)


def _single(outputs: np.ndarray | tuple[np.ndarray, ...]) -> F32:
    assert isinstance(outputs, np.ndarray)
    return outputs


def _opener(bundle: Bundle, stack: ExitStack) -> NewEngine:
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

        return lambda component: OnnxRuntimeEngine(folder, component, profiles)
    from runtime.engine_tensorrt import Device

    device = stack.enter_context(Device.open(bundle.manifest))
    return lambda component: device.engine(folder, component, profiles)
