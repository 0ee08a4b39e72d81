"""Prompt → video file, timed stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.arrays import F32
from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.denoise import Step
from runtime.pipeline import Pipeline
from runtime.recipe import recipe_of
from runtime.request import Request
from runtime.video import QUALITY, check_destination, check_quality, encode_video, renamed_at_end
from wan22.caching import Caching
from wan22.outputs import check_no_source
from wan22.progress import Progress, silent
from wan22.residency import ResidencyChoice


@dataclass(frozen=True)
class StepTiming:
    index: int
    timestep: float
    expert: str
    engine_seconds: float
    total_seconds: float
    cached: bool = False
    late_cfg: bool = False

    @classmethod
    def of(cls, step: Step) -> "StepTiming":
        times = (step.seconds_engine, step.seconds_total)
        return cls(step.index, step.timestep, step.expert, *times, step.cached, step.late_cfg)


@dataclass
class Timings:
    """The time of a run, in seconds, by stage and step."""

    stages: dict[str, float] = field(default_factory=dict)
    steps: list[StepTiming] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started

    @property
    def skipped(self) -> list[int]:
        """The steps, from 0, whose velocity was estimated."""
        return [step.index for step in self.steps if step.cached]

    @property
    def late(self) -> list[int]:
        """The steps, from 0, whose guidance was estimated."""
        return [step.index for step in self.steps if step.late_cfg]

    @property
    def sampler_overhead(self) -> float:
        """The share of step time spent outside engines, 0…1: the median over all computed steps but the first."""
        steps = [step for step in self.steps[1:] if not step.cached] or self.steps
        return float(np.median([1 - s.engine_seconds / s.total_seconds for s in steps])) if steps else 0.0


@dataclass(frozen=True)
class Encoding:
    """The settings that turn frames into a file."""

    fps: int | None = None  # None: the model's
    quality: int = QUALITY  # 1 to 10, for mp4 and webm
    overwrite: bool = False  # a folder of frames may be replaced


@dataclass(frozen=True, eq=False)
class Generated:
    path: Path
    seed: int
    width: int
    height: int
    frames: int
    fps: int
    latents: F32  # [1, z, T, h, w], clean
    timings: Timings
    cache: Caching | None = None  # with the lists of the steps that the run skipped


def generate(
    engines: Path | Pipeline,
    request: Request,
    output: Path,
    encoding: Encoding = Encoding(),
    *,
    residency: ResidencyChoice = "auto",
    blocks: BlockOptions = BLOCKS_AS_FIT,
    progress: Progress = silent,
) -> Generated:
    """Run ``request`` and write ``output`` as ``encode_video`` does, with its recipe in the metadata.

    ``residency`` and ``blocks`` apply to engines at a path, opened for this run alone; a pipeline has its own.

    Raises:
        UserError: the request, engines or output are invalid; raised before any work if possible.
    """
    if isinstance(engines, Path):
        with Pipeline.open(engines, residency=residency, once=True, blocks=blocks) as pipeline:
            return generate(pipeline, request, output, encoding, progress=progress)
    pipeline, timings = engines, Timings()
    complete, rate = pipeline.complete(request), encoding.fps or pipeline.spec.sampling.fps
    check_destination(output, complete.frames, overwrite=encoding.overwrite)
    check_quality(encoding.quality)
    check_no_source(output, request.image, request.last_image, pipeline.bundle.folder)
    with renamed_at_end(output, overwrite=encoding.overwrite) as new:
        with timings.stage("denoise"):
            for step in pipeline.denoise(complete):
                latents = step.latents
                timings.steps.append(StepTiming.of(step))
                progress("denoise", step.index + 1, step.total, "steps")
        complete = complete.as_decided(timings.skipped, timings.late)
        note = recipe_of(complete, pipeline.weight_sets.manifest(complete.lora), rate, encoding.quality).encoded()
        with timings.stage("decode and write"):
            chunks = _report_chunks(pipeline.decode(latents), complete.frames, progress)
            encode_video(chunks, new, rate, encoding.quality, note)
    return Generated(
        output, complete.seed, complete.width, complete.height, complete.frames, rate, latents, timings, complete.cache
    )


def _report_chunks(chunks: Iterator[F32], frames: int, progress: Progress) -> Iterator[F32]:
    """Yield ``chunks`` and report the progress in frames."""
    done = 0
    for chunk in chunks:
        done += chunk.shape[2]
        progress("decode frames", done, frames, "frames")
        yield chunk
