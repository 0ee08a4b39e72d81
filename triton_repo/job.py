"""One job, from a checked request to the bytes of a video, telling what it does as it goes.

Nothing here knows Triton: the answers go to a callable, and so does the question whether anybody still wants them.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from runtime.arrays import F32, to_numpy
from runtime.denoise import Step
from runtime.recipe import recipe_of
from runtime.vae import decode
from runtime.video import QUALITY, encode_video, to_uint8
from triton_repo.failure import Code
from triton_repo.schema import VIDEO_FORMATS
from triton_repo.served_pipeline import ServedPipeline
from triton_repo.wanted import Wanted
from wan22.files import scratch_folder

PREVIEW_QUALITY = 80


class CancelledError(Exception):
    """Nobody wants the answer any more."""


class OutOfTimeError(Exception):
    """The deadline passed, the job ran as long as any may, or the server is stopping."""

    def __init__(self, message: str, code: Code = "DEADLINE_EXCEEDED") -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True)
class Answer:
    """One response: what is going on, and the video or a preview when there is one."""

    event: dict[str, Any]
    video: bytes = b""
    preview: bytes = b""

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            "event": np.array([msgspec.json.encode(self.event)], np.object_),
            "video": np.frombuffer(self.video, np.uint8),
            "preview": np.frombuffer(self.preview, np.uint8),
        }


@dataclass
class Job:
    """Runs ``wanted`` on ``pipeline``; ``send`` is given every answer but the last, which ``run`` returns."""

    pipeline: ServedPipeline
    wanted: Wanted
    send: Callable[[Answer], None]
    is_cancelled: Callable[[], bool]
    longest_s: float
    on_step: Callable[[Step], None]
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the first event
    _started: float = field(default_factory=time.monotonic)
    _started_unix_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    def run(self) -> Answer:
        """Raises CancelledError or OutOfTimeError within an engine call of the cause; else what the pipeline raises."""
        self.pipeline.pause = self._go_on
        self._tell("start", total=self.wanted.request.steps, **self._shape(), **self.facts)
        latents = self._denoise()
        video = self._video(latents)
        digest = hashlib.sha256(to_numpy(latents).tobytes()).hexdigest()
        seconds = round(time.monotonic() - self._started, 3)
        done = {"phase": "done", "step": 1, "total": 1, "progress": 1.0, "eta_s": 0.0, "seconds": seconds}
        return Answer({**done, **self._shape(), "latents_sha256": digest}, video)

    def _shape(self) -> dict[str, Any]:
        """What the request became, so that it can be asked for again."""
        request, wanted = self.wanted.request, self.wanted
        return {
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            "frames": request.frames,
            "fps": wanted.fps,
            "steps": request.steps,
            "format": wanted.output_format,
            "started_unix_ms": self._started_unix_ms,
        }

    def _go_on(self) -> None:
        if self.is_cancelled():
            raise CancelledError
        ran_s = time.monotonic() - self._started
        if ran_s > self.wanted.deadline_s:
            raise OutOfTimeError("the deadline of the request has passed")
        if ran_s > self.longest_s:
            raise OutOfTimeError(f"the job ran {self.longest_s} s, as long as any may on this server")

    def _tell(self, phase: str, step: int = 0, total: int = 0, preview: bytes = b"", **more: Any) -> None:
        progress = step / total if total else 0.0
        event = {"phase": phase, "step": step, "total": total, "progress": round(progress, 4), **more}
        self.send(Answer({"seed": self.wanted.request.seed, **event}, preview=preview))

    def _denoise(self) -> F32:
        """Clean latents; an event for every ``progress_every``-th step and the last."""
        before, seconds = None, []
        for step in self.pipeline.denoise(self.wanted.request):
            self._go_on()
            self.on_step(step)
            seconds.append(step.seconds_total)
            done = step.index + 1
            if done % self.wanted.progress_every == 0 or done == step.total:
                eta = median(seconds) * (step.total - done)
                preview = self._preview(step, before) if self.wanted.preview else b""
                self._tell("denoise", done, step.total, preview, expert=step.expert, eta_s=round(eta, 3))
            before = step.latents
        return step.latents

    def _preview(self, step: Step, before: F32 | None) -> bytes:
        """One frame as a JPEG, from a guess at where the run will end; empty before a second step.

        The first frame, but a middle one where the first is a given image.
        """
        request = self.wanted.request
        if request.solver == "renoise":  # its latents hold fresh noise, so two of them point nowhere
            return b""
        guess = clean_estimate(before, step.latents, request.noise_schedule().sigmas, step.index)
        if guess is None:
            return b""
        at = 0 if request.image is None else guess.shape[2] // 2
        (frames,) = decode(self.pipeline.on_call("vae_decoder_first"), None, guess[:, :, at : at + 1])
        picture = io.BytesIO()
        Image.fromarray(to_uint8(frames)[0]).save(picture, "JPEG", quality=PREVIEW_QUALITY)
        return picture.getvalue()

    def _video(self, latents: F32) -> bytes:
        with scratch_folder("job") as folder:
            path = folder / f"video{VIDEO_FORMATS[self.wanted.output_format]}"
            recipe = recipe_of(self.wanted.request, self.pipeline.bundle.manifest, self.wanted.fps, QUALITY)
            encode_video(self._told(self.pipeline.decode(latents)), path, self.wanted.fps, QUALITY, recipe.encoded())
            return path.read_bytes()

    def _told(self, chunks: Iterator[F32]) -> Iterator[F32]:
        """``chunks``, with an event for each."""
        done, total, started = 0, self.wanted.request.frames, time.monotonic()
        for chunk in chunks:
            done += chunk.shape[2]
            eta = (time.monotonic() - started) / done * (total - done)
            self._tell("decode", done, total, eta_s=round(eta, 3))
            yield chunk


def clean_estimate(before: F32 | None, latents: F32, sigmas: F32, index: int) -> F32 | None:
    """Where the step from ``before`` to ``latents`` points to at sigma 0; ``latents`` itself after the last step.

    Between two steps of a flow-matching run the latents move along the model's velocity, ``v ≈ (x₁ - x₀) / (σ₁ - σ₀)``,
    whatever the solver. Following it to σ = 0 gives ``x₁ - σ₁ v``, without asking the model again.

    Args:
        before: latents after step ``index - 1``; None before the second step, when there is no estimate.
        latents: after step ``index``, ``[1, z, T, h, w]``.
        sigmas: of the run, ``[N + 1]``, falling to 0.
        index: from 0.
    """
    at, to = float(sigmas[index]), float(sigmas[index + 1])
    if to == 0:
        return latents
    if before is None:
        return None
    estimate: F32 = latents - to / (to - at) * (latents - before)
    return estimate
