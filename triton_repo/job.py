"""Run one job, from a checked request to the bytes of a video, with progress events.

This module does not depend on Triton: it sends responses and asks about cancellation through callables.
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
from runtime.video import encode_video, to_uint8
from triton_repo.failure import Code
from triton_repo.job_request import JobRequest
from triton_repo.schema import VIDEO_FORMATS
from triton_repo.served_pipeline import ServedPipeline
from wan22.files import scratch_folder

PREVIEW_QUALITY = 80


class CancelledError(Exception):
    """The client has cancelled the job."""


class OutOfTimeError(Exception):
    """The deadline passed, the job exceeded the time limit, or the server is stopping."""

    def __init__(self, message: str, code: Code = "DEADLINE_EXCEEDED") -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True)
class Answer:
    """One response: an event, with the video or a preview if there is one."""

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
    """Runs ``asked`` on ``pipeline``; ``send`` receives every answer but the last, which ``run`` returns."""

    pipeline: ServedPipeline
    asked: JobRequest
    send: Callable[[Answer], None]
    is_cancelled: Callable[[], bool]
    longest_s: float
    on_step: Callable[[Step], None]
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the first event
    _skipped: list[int] = field(default_factory=list)
    _late: list[int] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _started_unix_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    def run(self) -> Answer:
        """The last answer, with the video.

        Raises:
            CancelledError: within one engine call of the cancellation.
            OutOfTimeError: within one engine call of the time limit.
            Exception: any error of the pipeline.
        """
        self.pipeline.pause = self._check_time
        self._send_event("start", total=self.asked.request.steps, **self._shape(), **self.facts)
        latents = self._denoise()
        video = self._video(latents)
        digest = hashlib.sha256(to_numpy(latents).tobytes()).hexdigest()
        seconds = round(time.monotonic() - self._started, 3)
        done = {"phase": "done", "step": 1, "total": 1, "progress": 1.0, "eta_s": 0.0, "seconds": seconds}
        lists = {"skipped": self._skipped, "late_cfg": self._late} if self.asked.request.cache else {}
        return Answer({**done, **self._shape(), **lists, "latents_sha256": digest}, video)

    def _shape(self) -> dict[str, Any]:
        """The values of the complete request, so that the client can repeat it."""
        request, asked = self.asked.request, self.asked
        return {
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            "frames": request.frames,
            "fps": asked.fps,
            "steps": request.steps,
            "format": asked.output_format,
            **({"lora": request.lora} if request.lora else {}),
            "started_unix_ms": self._started_unix_ms,
        }

    def _check_time(self) -> None:
        """Raise CancelledError or OutOfTimeError if the job should end."""
        if self.is_cancelled():
            raise CancelledError
        ran_s = time.monotonic() - self._started
        if ran_s > self.asked.deadline_s:
            raise OutOfTimeError("the deadline of the request has passed")
        if ran_s > self.longest_s:
            raise OutOfTimeError(f"the job reached this server's limit of {self.longest_s} s")

    def _send_event(self, phase: str, step: int = 0, total: int = 0, preview: bytes = b"", **more: Any) -> None:
        progress = step / total if total else 0.0
        event = {"phase": phase, "step": step, "total": total, "progress": round(progress, 4), **more}
        self.send(Answer({"seed": self.asked.request.seed, **event}, preview=preview))

    def _denoise(self) -> F32:
        """The clean latents; sends an event for every ``progress_every``-th step and the last."""
        before, seconds = None, []
        for step in self.pipeline.denoise(self.asked.request):
            self._check_time()
            self.on_step(step)
            seconds.append(step.seconds_total)
            self._skipped += [step.index] if step.cached else []
            self._late += [step.index] if step.late_cfg else []
            done = step.index + 1
            if done % self.asked.progress_every == 0 or done == step.total:
                eta = median(seconds) * (step.total - done)
                preview = self._preview(step, before) if self.asked.preview else b""
                more = {"expert": step.expert, "eta_s": round(eta, 3), "cached": step.cached}
                self._send_event("denoise", done, step.total, preview, **more)
            before = step.latents
        return step.latents

    def _preview(self, step: Step, before: F32 | None) -> bytes:
        """One frame as a JPEG, from an estimate of the clean latents; empty before the second step.

        It is the first frame, or the middle one if the video starts from an image.
        """
        request = self.asked.request
        if request.solver == "renoise":  # adds fresh noise, so the difference of two steps has no direction
            return b""
        guess = clean_estimate(before, step.latents, request.noise_schedule().sigmas, step.index)
        if guess is None:
            return b""
        at = 0 if request.image is None else guess.shape[2] // 2
        (frames,) = self.pipeline.decode(guess[:, :, at : at + 1])
        picture = io.BytesIO()
        Image.fromarray(to_uint8(frames)[0]).save(picture, "JPEG", quality=PREVIEW_QUALITY)
        return picture.getvalue()

    def _video(self, latents: F32) -> bytes:
        with scratch_folder("job") as folder:
            path = folder / f"video{VIDEO_FORMATS[self.asked.output_format]}"
            fps, quality = self.asked.fps, self.asked.quality
            request = self.asked.request.as_decided(self._skipped, self._late)
            recipe = recipe_of(request, self.pipeline.weight_sets.manifest(request.lora), fps, quality)
            encode_video(self._report_chunks(self.pipeline.decode(latents)), path, fps, quality, recipe.encoded())
            return path.read_bytes()

    def _report_chunks(self, chunks: Iterator[F32]) -> Iterator[F32]:
        """Yield ``chunks`` and send an event for each."""
        done, total, started = 0, self.asked.request.frames, time.monotonic()
        for chunk in chunks:
            done += chunk.shape[2]
            eta = (time.monotonic() - started) / done * (total - done)
            self._send_event("decode", done, total, eta_s=round(eta, 3))
            yield chunk


def clean_estimate(before: F32 | None, latents: F32, sigmas: F32, index: int) -> F32 | None:
    """Extrapolate the step from ``before`` to ``latents`` to sigma 0; ``latents`` itself after the last step.

    Between two steps of a flow-matching run, latents move along the model's velocity ``v ≈ (x₁ - x₀) / (σ₁ - σ₀)`` with
    any solver. Following it to σ = 0 gives ``x₁ - σ₁ v`` without another call of the model.

    Args:
        before: latents after step ``index - 1``; None in the first step, which has no estimate.
        latents: latents after step ``index``, ``[1, z, T, h, w]``.
        sigmas: the run's noise levels, ``[N + 1]``, falling to 0.
        index: the step, from 0.
    """
    at, to = float(sigmas[index]), float(sigmas[index + 1])
    if to == 0:
        return latents
    if before is None:
        return None
    estimate: F32 = latents - to / (to - at) * (latents - before)
    return estimate
