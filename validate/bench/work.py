"""The work that a bench times, as arrays that all sides share, and the interface of a side.

A *piece* is the unit of work: the text encoder on the prompt, one forward of an expert, the VAE on the whole video.
Nothing here imports PyTorch, so that memory can be measured in a process without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from runtime.arrays import F32
from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.forward_inputs import text_rows
from runtime.image_condition import conditioning_video, fit_image, i2v_condition
from runtime.noise import standard_normal
from runtime.request import CompleteRequest, Request
from runtime.tokenizer import Tokenizer
from validate.bench.whole_run import Event
from validate.options import complete_request
from validate.reference.device import Choice
from wan22.bundle import Bundle, Manifest
from wan22.errors import UserError
from wan22.residency import ResidencyChoice
from wan22.specs import ModelSpec, tokens

OURS, EAGER, COMPILED = "ours", "eager", "compiled"  # sides
TEXT, ENCODER, DECODER = "text_encoder", "vae_encoder", "vae_decoder"  # pieces other than the experts
RUN = "end_to_end"  # from prompt to frames, all pieces together
TIMESTEPS = {"high_noise": 950.0, "low_noise": 500.0, "dit": 500.0}  # at which an expert is timed
STEPS = 4  # of an end-to-end run by default: enough for both experts
RUNS, WHOLE_RUNS = 5, 3


@dataclass(frozen=True)
class BenchOptions:
    request: Request = field(default_factory=Request)  # STEPS steps by default; see validate.options.with_samples
    # measurements
    only: tuple[str, ...] = ()  # pieces; empty: all
    runs: int = RUNS  # timed runs per piece and side
    warmup: int = 1  # untimed runs before them
    compiled: bool = False  # torch.compile as a third side
    memory: bool = True
    whole_runs: int = WHOLE_RUNS  # end-to-end runs, from prompt to frames
    reference_device: Choice = "auto"  # the device of PyTorch
    residency: ResidencyChoice = "auto"  # the engines that stay loaded
    # for the record
    command: str = ""
    blocks: BlockOptions = BLOCKS_AS_FIT  # where the weights of engines in blocks are

    def complete_request(self, manifest: Manifest) -> CompleteRequest:
        """The complete request. Raises UserError if the model or the engines cannot serve it."""
        steps = STEPS if self.request.steps is None else self.request.steps
        return complete_request(replace(self.request, steps=steps), manifest)


@dataclass(frozen=True, eq=False)
class Work:
    """One request as arrays. Noise stands in for computed values, since times do not depend on them."""

    spec: ModelSpec
    request: CompleteRequest
    token_ids: np.ndarray  # int64 [1, n] of the prompt
    negative_ids: np.ndarray
    text: F32  # [1, 512, text width]; the first n rows are not zero
    latents: F32  # [1, z, T, h, w]
    video: F32 | None = None  # [1, 3, F, H, W], the VAE encoder's input if there is an image
    condition: F32 | None = None  # [1, 4 + z, T, h, w] (I2V)
    first_frame: F32 | None = None  # [1, z, 1, h, w] (TI2V)
    cached: CompleteRequest | None = None  # the request with its step cache, which ``request`` never has

    @property
    def tokens(self) -> int:
        return tokens(self.latents.shape)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The pieces in the order of a run."""
        return pieces_of(self.spec, has_image=self.video is not None)

    def select_pieces(self, only: tuple[str, ...]) -> tuple[str, ...]:
        """The pieces named in ``only``, or all if it is empty. Raises UserError for an unknown piece."""
        for name in only:
            if name not in self.pieces:
                raise UserError(f"piece {name!r}", f"one of {', '.join(self.pieces)}", "name one of them with --only")
        return tuple(name for name in self.pieces if not only or name in only)


class Side(Protocol):
    """One way to compute the pieces."""

    def open(self, piece: str) -> None:
        """Load what ``piece`` needs and release everything else."""

    def chunks(self, piece: str) -> Iterator[Any]:
        """Compute ``piece`` and yield its result, in parts if the side computes it so."""

    def join(self, chunks: list[Any]) -> F32:
        """Join the parts into one array."""

    def close(self) -> None:
        """Release everything."""

    def run(self) -> Iterator[Event]:
        """Run from the prompt to the last frame. Parts are loaded again, in events separate from the work."""

    def device_tensors(self) -> int | None:
        """The peak bytes of the side's tensors on a GPU; None without a GPU or if unknown."""


def runner(side: Side, piece: str) -> Callable[[], None]:
    """The run to time. Parts are discarded as they arrive, as a video writer would do."""

    def run() -> None:
        for _ in side.chunks(piece):
            pass

    return run


def pieces_of(spec: ModelSpec, *, has_image: bool) -> tuple[str, ...]:
    return (TEXT, *([ENCODER] if has_image else []), *spec.experts, DECODER)


def components_of(piece: str, work: Work) -> tuple[str, ...]:
    """The graphs that ``piece`` runs for this model and this length of video."""
    if piece not in (ENCODER, DECODER):
        return (piece,)
    names = [f"{piece}_first", *([f"{piece}_next"] if work.latents.shape[2] > 1 else [])]
    return tuple(name for name in names if name in work.spec.components)


def work_for(bundle: Bundle, options: BenchOptions) -> Work:
    """Create the arrays of the request. Raises UserError if the model or the engines cannot serve it."""
    request, spec = options.complete_request(bundle.manifest), bundle.manifest.spec
    tokenizer = Tokenizer(bundle.folder / "tokenizer")
    ids = tokenizer.encode(request.prompt).ids
    negative = tokenizer.encode(request.negative_prompt, allow_empty=True).ids
    text = text_rows(standard_normal((1, ids.shape[1], spec.dit.text_width), 1))
    latents = standard_normal(request.latent_shape, request.seed)
    exact, cached = replace(request, cache=None), request if request.cache else None
    return Work(spec, exact, ids, negative, text, latents, cached=cached, **_of_image(spec, exact))


def _of_image(spec: ModelSpec, request: CompleteRequest) -> dict[str, F32]:
    """``video``, ``condition`` and ``first_frame`` of the request's image; empty without one."""
    if request.image is None:
        return {}
    first = fit_image(request.image, spec.takes.resizing, (request.width, request.height), request.fit)
    if spec.takes.clean_first_frame:
        shape = (*request.latent_shape[:2], 1, *request.latent_shape[3:])
        return {"video": first, "first_frame": standard_normal(shape, 2)}
    video = conditioning_video(first, request.frames)
    return {"video": video, "condition": i2v_condition(standard_normal(request.latent_shape, 2))}
