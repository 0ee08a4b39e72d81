"""PyTorch's side of a bench: modules of diffusers and transformers with the checkpoint's weights, as users run them.

Each part has the precision of its component in the bundle, except what diffusers keeps in float32. Unlike the parity
check, the bench does not match arithmetic: convolutions use whatever kernel torch picks.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException

from export.checkpoint.checkpoint import Checkpoint
from runtime.arrays import F32
from validate.bench.samples import measure_time
from validate.bench.whole_run import Event
from validate.bench.work import DECODER, ENCODER, TEXT, TIMESTEPS, Work
from validate.reference.device import Device, catch_out_of_memory
from validate.reference.parts import load_part, lower, timesteps_of
from validate.reference.precision import dtype_of
from validate.reference.whole_run import initial_noise, scheduler_for
from wan22.bundle import Manifest
from wan22.errors import NonFiniteError, UserError
from wan22.progress import Progress, silent

VAE = "vae"


class TorchSide:
    """The pieces, computed by PyTorch, with one part of the model loaded at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        work: Work,
        progress: Progress = silent,
        compiled: bool = False,
        device: Device = "cpu",
    ) -> None:
        self._checkpoint, self._work, self._progress, self._compiled = checkpoint, work, progress, compiled
        self._precisions = {component.name: component.precision for component in manifest.components}
        self.device = torch.device(device)
        self._parts: dict[str, Any] = {}

    # -- pieces

    def open(self, piece: str) -> None:
        needed = VAE if piece in (ENCODER, DECODER) else piece
        for other in set(self._parts) - {needed}:
            del self._parts[other]
        with _catch_compile_errors():
            self._part(needed)

    def chunks(self, piece: str) -> Iterator[Any]:
        """Yield one tensor, since PyTorch's pipelines return all frames at once.

        Raises:
            UserError: torch.compile cannot compile the piece, or the GPU is too small for it.
        """
        with _catch_compile_errors():
            yield from self._chunks(piece)

    def _chunks(self, piece: str) -> Iterator[Any]:
        work = self._work
        if piece == TEXT:
            yield self._done(self._encode(work.token_ids))
        elif piece == ENCODER:
            assert work.video is not None
            yield self._done(self._latents_of(torch.from_numpy(work.video)))
        elif piece == DECODER:
            yield self._done(self._frames_of(torch.from_numpy(work.latents)))
        else:
            tensors = [torch.from_numpy(array) for array in (work.latents, work.text)]
            yield self._done(self._velocity(piece, TIMESTEPS[piece], *tensors))

    def join(self, chunks: list[Any]) -> F32:
        array: F32 = chunks[0].float().cpu().numpy()
        return array

    def close(self) -> None:
        self._parts.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def device_tensors(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else None

    def _done(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return tensor

    # -- modules

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            module, dtype = load_part(self._checkpoint, name, self._progress), self._dtype(name)
            if dtype != torch.float32:
                lower(module, dtype)  # before the move to a GPU, which may be too small for float32
            module = module.to(self.device)
            self._parts[name] = _compile(module, name) if self._compiled else module
        return self._parts[name]

    def _dtype(self, part: str) -> torch.dtype:
        precision = self._precisions[f"{DECODER}_first" if part == VAE else part]
        return dtype_of(precision)

    @torch.inference_mode()
    def _encode(self, token_ids: np.ndarray) -> torch.Tensor:
        """Embeddings ``[1, n, text width]`` of ids ``[1, n]``, without padding, like our engine."""
        ids = torch.from_numpy(token_ids).to(self.device)
        hidden: torch.Tensor = self._part(TEXT)(input_ids=ids).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _velocity(self, expert: str, timestep: float, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        work, dtype = self._work, self._dtype(expert)
        seen = latents.to(self.device)
        if work.condition is not None:
            seen = torch.cat([seen, torch.from_numpy(work.condition).to(self.device)], dim=1)
        clean = work.first_frame is not None
        result: torch.Tensor = self._part(expert)(
            hidden_states=seen.to(dtype),
            encoder_hidden_states=text.to(self.device, dtype),
            timestep=timesteps_of(work.spec, latents.shape, timestep, clean_first_frame=clean).to(self.device),
            return_dict=False,
        )[0]
        return result

    @torch.inference_mode()
    def _frames_of(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics()
        latent = latents.to(self.device) / (1 / std) + mean  # wan22.md §4.3
        frames: torch.Tensor = self._part(VAE).decode(latent.to(self._dtype(VAE)), return_dict=False)[0]
        return frames

    @torch.inference_mode()
    def _latents_of(self, video: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics()
        encoded = self._part(VAE).encode(video.to(self.device, self._dtype(VAE)), return_dict=False)[0]
        latents: torch.Tensor = (encoded.mode().float() - mean) * (1 / std)
        return latents

    def _statistics(self) -> list[torch.Tensor]:
        vae = self._work.spec.vae
        both = (vae.latents_mean, vae.latents_std)
        return [torch.tensor(values, device=self.device).reshape(1, -1, 1, 1, 1) for values in both]

    # -- the whole run

    def run(self) -> Iterator[Event]:
        """Yield the events of an end-to-end run. All parts except the second expert are loaded before it.

        Raises UserError as ``chunks``.
        """
        with _catch_compile_errors():
            yield from self._run()

    def _run(self) -> Iterator[Event]:
        work = self._work
        for name in (TEXT, VAE, work.spec.experts[0]):
            yield Event("open", name, measure_time(partial(self._part, name))[1])
        texts: list[torch.Tensor] = []
        for ids in (work.token_ids, *([work.negative_ids] if work.request.guided else [])):
            text, seconds = measure_time(partial(self._encode_padded, ids))
            require_finite(text, f"PyTorch's embeddings of the {'negative ' if texts else ''}prompt")
            texts.append(text)
            yield Event("text", TEXT, seconds)
        if work.video is not None:
            video = torch.from_numpy(work.video)
            encoded, seconds = measure_time(lambda: self._done(self._latents_of(video)))
            require_finite(encoded, "PyTorch's encoded image")
            yield Event("image", ENCODER, seconds)
        latents = yield from self._denoise(texts)
        frames, seconds = measure_time(lambda: self._done(self._frames_of(latents)))
        require_finite(frames, "PyTorch's frames")
        yield Event("decode", DECODER, seconds)

    def _encode_padded(self, token_ids: np.ndarray) -> torch.Tensor:
        """Embeddings ``[1, 512, text width]``; rows after the last token are zero."""
        text = torch.zeros(self._work.text.shape, device=self.device)
        text[:, : token_ids.shape[1]] = self._encode(token_ids)
        return self._done(text)

    def _denoise(self, texts: list[torch.Tensor]) -> Generator[Event, None, torch.Tensor]:
        """Yield steps and swaps of experts; return the final latents."""
        request, spec = self._work.request, self._work.request.with_switch(self._work.spec)
        scheduler = scheduler_for(request)
        latents = torch.from_numpy(initial_noise(request)).to(self.device)
        for index, timestep in enumerate(scheduler.timesteps, 1):
            expert = spec.expert_at(float(timestep), index - 1)
            if expert not in self._parts:
                yield Event("swap", expert, measure_time(partial(self._swap, expert))[1])
            (latents, engine_seconds), seconds = measure_time(
                partial(self._step, scheduler, texts, expert, timestep, latents)
            )
            which = f"step {index} of {len(scheduler.timesteps)} (t = {float(timestep):g})"
            require_finite(latents, f"PyTorch's latents of {expert} after {which}")
            yield Event("step", expert, seconds, engine_seconds)
        return latents

    def _swap(self, expert: str) -> None:
        for other in self._work.spec.experts:
            self._parts.pop(other, None)
        self._part(expert)

    @torch.inference_mode()
    def _step(
        self, scheduler: Any, texts: list[torch.Tensor], expert: str, timestep: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The latents after a step, and the seconds spent in its forwards."""
        scale, t = self._work.request.guidance[expert], float(timestep)
        used = texts if scale != 1 else texts[:1]
        velocities, engine_seconds = measure_time(
            lambda: [self._done(self._velocity(expert, t, latents, text)).float() for text in used]
        )
        velocity = velocities[0]
        if len(velocities) > 1:
            velocity = velocities[1] + scale * (velocity - velocities[1])
        stepped: torch.Tensor = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if self._work.first_frame is not None:
            stepped = torch.cat([torch.from_numpy(self._work.first_frame).to(self.device), stepped[:, :, 1:]], dim=2)
        return self._done(stepped), engine_seconds


def check_compiles(device: torch.device) -> None:
    """Compile a trivial function, to raise UserError before any work if torch.compile does not work."""
    with _catch_compile_errors():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))


@contextmanager
def _catch_compile_errors() -> Iterator[None]:
    try:
        with catch_out_of_memory():
            yield
    except TorchDynamoException as error:
        found = f"torch.compile: {str(error).splitlines()[0]}"
        raise UserError(found, "a working compiler", "install g++ (and triton for a GPU), or omit --compile") from error


def _compile(module: Any, part: str) -> Any:
    """Compile ``module``, or the two halves of the VAE, which its streaming loop calls."""
    if part != VAE:
        return torch.compile(module)
    module.encoder, module.decoder = torch.compile(module.encoder), torch.compile(module.decoder)
    return module


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise NonFiniteError unless every value is finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{what}: NaN or infinity")
