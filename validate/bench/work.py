"""What is timed, in numbers that every side is given alike, and what a side is.

A *piece* is work that both sides do as one: the text encoder on the prompt, one forward of an expert, the VAE on the
whole video. Nothing here loads PyTorch, so that memory can be measured in a process that has never seen it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from runtime.arrays import F32
from runtime.forward_inputs import text_rows
from runtime.image_condition import conditioning_video, fit_image, i2v_condition
from runtime.noise import standard_normal
from runtime.request import CompleteRequest, Request
from runtime.tokenizer import Tokenizer
from validate.bench.whole_run import Event
from validate.options import completed
from validate.reference.device import Choice
from wan22.bundle import Bundle, Manifest
from wan22.errors import UserError
from wan22.specs import ModelSpec, tokens

OURS, EAGER, COMPILED = "ours", "eager", "compiled"  # sides
TEXT, ENCODER, DECODER = "text_encoder", "vae_encoder", "vae_decoder"  # pieces beside the experts
RUN = "end_to_end"  # from prompt to frames, all pieces together
TIMESTEPS = {"high_noise": 950.0, "low_noise": 500.0, "dit": 500.0}  # where an expert is timed
STEPS = 4  # of a whole run unless asked otherwise: enough for both experts
RUNS, WHOLE_RUNS = 5, 3


@dataclass(frozen=True)
class BenchOptions:
    request: Request = field(default_factory=Request)  # of STEPS unless it says; see validate.options.with_samples
    # what is measured
    only: tuple[str, ...] = ()  # pieces; none named: all of them
    runs: int = RUNS  # timed runs of every piece and side
    warmup: int = 1  # runs before them
    compiled: bool = False  # torch.compile as a third side
    memory: bool = True
    whole_runs: int = WHOLE_RUNS  # from prompt to frames
    reference_device: Choice = "auto"  # of PyTorch
    # for the record
    command: str = ""

    def completed(self, manifest: Manifest) -> CompleteRequest:
        """Raises UserError for what the model or the engines cannot do."""
        steps = STEPS if self.request.steps is None else self.request.steps
        return completed(replace(self.request, steps=steps), manifest)


@dataclass(frozen=True, eq=False)
class Work:
    """One request as arrays. Values that a run would have to compute first are noise: timing does not see them."""

    spec: ModelSpec
    request: CompleteRequest
    token_ids: np.ndarray  # int64 [1, n] of the prompt
    negative_ids: np.ndarray
    text: F32  # [1, 512, text width], n rows of it not zero
    latents: F32  # [1, z, T, h, w]
    video: F32 | None = None  # [1, 3, F, H, W] that the VAE encodes, where there is an image
    condition: F32 | None = None  # [1, 4 + z, T, h, w] (I2V)
    first_frame: F32 | None = None  # [1, z, 1, h, w] (TI2V)

    @property
    def tokens(self) -> int:
        return tokens(self.latents.shape)

    @property
    def pieces(self) -> tuple[str, ...]:
        """In the order in which a run needs them."""
        return pieces_of(self.spec, has_image=self.video is not None)

    def chosen(self, only: tuple[str, ...]) -> tuple[str, ...]:
        """The pieces named in ``only``, all where nothing is. Raises UserError for one that there is not."""
        for name in only:
            if name not in self.pieces:
                raise UserError(f"piece {name!r}", f"one of {', '.join(self.pieces)}", "name one of them with --only")
        return tuple(name for name in self.pieces if not only or name in only)


class Side(Protocol):
    """One way to compute the pieces."""

    def open(self, piece: str) -> None:
        """Loads what ``piece`` needs and lets go of what it does not."""
        ...

    def chunks(self, piece: str) -> Iterator[Any]:
        """Computes ``piece``, part by part where the side has it in parts; done when the iterator is exhausted."""
        ...

    def joined(self, chunks: list[Any]) -> F32:
        """The parts as one array."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...

    def run(self) -> Iterator[Event]:
        """From the prompt to the last frame, loading told apart; parts are loaded anew."""
        ...

    def device_tensors(self) -> int | None:
        """The most bytes of a GPU that the side's tensors took; None where it has none there, or cannot tell."""
        ...


def runner(side: Side, piece: str) -> Callable[[], None]:
    """The timed run: parts are dropped as they come, as a writer of video would."""

    def run() -> None:
        for _ in side.chunks(piece):
            pass

    return run


def pieces_of(spec: ModelSpec, *, has_image: bool) -> tuple[str, ...]:
    return (TEXT, *([ENCODER] if has_image else []), *spec.experts, DECODER)


def components_of(piece: str, work: Work) -> tuple[str, ...]:
    """The graphs that ``piece`` runs, as far as this model has them and a video of this length needs them."""
    if piece not in (ENCODER, DECODER):
        return (piece,)
    names = [f"{piece}_first", *([f"{piece}_next"] if work.latents.shape[2] > 1 else [])]
    return tuple(name for name in names if name in work.spec.components)


def work_for(bundle: Bundle, options: BenchOptions) -> Work:
    """Raises UserError for a request that the model or the engines cannot serve."""
    request, spec = options.completed(bundle.manifest), bundle.manifest.spec
    tokenizer = Tokenizer(bundle.folder / "tokenizer")
    ids = tokenizer.encode(request.prompt).ids
    negative = tokenizer.encode(request.negative_prompt, allow_empty=True).ids
    text = text_rows(standard_normal((1, ids.shape[1], spec.dit.text_width), 1))
    latents = standard_normal(request.latent_shape, request.seed)
    return Work(spec, request, ids, negative, text, latents, **_of_image(spec, request))


def _of_image(spec: ModelSpec, request: CompleteRequest) -> dict[str, F32]:
    """``video``, ``condition`` and ``first_frame`` as far as the request has an image."""
    if request.image is None:
        return {}
    first = fit_image(request.image, spec.takes.resizing, (request.width, request.height), request.fit)
    if spec.takes.clean_first_frame:
        shape = (*request.latent_shape[:2], 1, *request.latent_shape[3:])
        return {"video": first, "first_frame": standard_normal(shape, 2)}
    video = conditioning_video(first, request.frames)
    return {"video": video, "condition": i2v_condition(standard_normal(request.latent_shape, 2))}
