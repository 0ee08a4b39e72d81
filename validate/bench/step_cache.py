"""Denoising with and without a step cache: the time that it saves, and its own cost in time and memory."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.arrays import F32
from runtime.denoise import Conditions, Step, denoise
from runtime.pipeline import Pipeline
from runtime.request import CompleteRequest
from runtime.step_cache import StepCache
from validate.bench.work import Work
from wan22.caching import Caching
from wan22.progress import Progress

SUBJECT = "step_cache"
MEASURED = ("speedup", "saved_percent", "skipped_steps", "overhead_ms", "overhead_percent", "held_latents")
BOOKKEEPING_RUNS = 20


@dataclass(frozen=True)
class CacheTimes:
    """Medians over the runs of both kinds; ``held_latents`` counts arrays in the shape of the latents."""

    caching: Caching  # with the lists of what it decided
    exact_s: float  # denoising without the cache
    cached_s: float
    step_ms: float  # a computed step
    overhead_ms: float  # what the cache adds to one
    held_latents: float  # at most kept between steps
    by_expert: Mapping[str, tuple[int, int]]  # skipped steps, all steps

    def measurements(self) -> dict[str, float]:
        values = (
            self.exact_s / self.cached_s,
            100 * (1 - self.cached_s / self.exact_s),
            float(sum(skipped for skipped, _ in self.by_expert.values())),
            self.overhead_ms,
            100 * self.overhead_ms / self.step_ms,
            self.held_latents,
        )
        return {f"{SUBJECT}.{name}": value for name, value in zip(MEASURED, values, strict=True)}

    def as_json(self) -> dict[str, Any]:
        experts = {name: {"skipped": of[0], "steps": of[1]} for name, of in self.by_expert.items()}
        times = {name: getattr(self, name) for name in ("exact_s", "cached_s", "step_ms")}
        settings = json.loads(json.dumps(vars(self.caching)))  # lists, as in the file of an earlier bench
        return {"settings": settings, **times, "by_expert": experts}


def time_cache(pipeline: Pipeline, work: Work, runs: int, progress: Progress) -> CacheTimes:
    """Denoise ``work`` without and with its cache, step by step in turns, ``runs`` times after one untimed run.

    Raises:
        NonFiniteError: the engines compute NaN or infinity.
    """
    exact, cached = work.request, work.cached
    assert cached is not None
    assert cached.cache is not None
    positive = pipeline.text(exact.prompt)
    negative = pipeline.text(exact.negative_prompt, allow_empty=True) if exact.guided else None
    given = Conditions(positive, negative, **pipeline.image_condition(exact))
    for _ in _steps(pipeline, exact, given):
        pass
    times: dict[str, list[float]] = {"exact": [], "cached": [], "computed": []}
    held = 0
    for done in range(runs):
        pairs = list(zip(_steps(pipeline, exact, given), _steps(pipeline, cached, given), strict=True))
        steps = [step for _, (step, _) in pairs]
        times["exact"].append(math.fsum(step.seconds_total for (step, _), _ in pairs))
        times["cached"].append(math.fsum(step.seconds_total for step in steps))
        times["computed"] += [step.seconds_total for (step, _), _ in pairs]
        held = max(held, *(size for _, (_, size) in pairs))
        progress("step cache", done + 1, runs, "runs")
    skipped = Counter(step.expert for step in steps if step.cached)
    every = Counter(step.expert for step in steps)
    decided = cached.as_decided(
        [step.index for step in steps if step.cached], [step.index for step in steps if step.late_cfg]
    )
    cache = cached.sampler(pipeline.spec).cache
    assert decided.cache is not None
    assert cache is not None
    return CacheTimes(
        decided.cache,
        float(np.median(times["exact"])),
        float(np.median(times["cached"])),
        1000 * float(np.median(times["computed"])),
        1000 * overhead_s(cache, work.latents),
        held / work.latents.nbytes,
        {name: (skipped[name], count) for name, count in every.items()},
    )


def _steps(pipeline: Pipeline, request: CompleteRequest, given: Conditions) -> Iterator[tuple[Step, int]]:
    """The steps of one run, each with the bytes that its cache keeps after it."""
    sampler, spec = request.sampler(pipeline.spec), request.with_switch(pipeline.spec)
    for step in denoise(spec, pipeline.engine, request.initial_noise(), given, sampler):
        yield step, sampler.cache.held_bytes if sampler.cache else 0


def overhead_s(cache: StepCache, latents: F32) -> float:
    """The median seconds of this thread that ``cache`` adds to a computed step, on arrays like ``latents``."""
    seconds = []
    conditional, velocity = (scale * latents for scale in (np.float32(2), np.float32(3)))
    for _ in range(BOOKKEEPING_RUNS):
        started = time.thread_time()
        cache.skips(1)
        cache.observe(1, latents, conditional, velocity)
        cache.moved(latents, velocity)
        seconds.append(time.thread_time() - started)
    return float(np.median(seconds))
