"""Several devices against one of them: seconds of a step and of decoding, scaling efficiency, and what is exchanged.

On a CPU a device is a thread, so the one device has as many threads in a session as each of the group.
"""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from runtime.block_backend import check_options
from runtime.denoise import Conditions, denoise
from runtime.engine_onnxruntime import threads_of_sessions
from runtime.pipeline import Pipeline
from validate.bench.machine import load_average, machine
from validate.bench.samples import measure_time
from validate.bench.work import BenchOptions, Work, work_for
from wan22.bundle import Bundle, open_bundle
from wan22.errors import UserError
from wan22.progress import Progress
from wan22.quantities import human_bytes, video_text

STEPS_AT_LEAST = 4  # so that every expert has a step that is not its first


@dataclass(frozen=True)
class Side:
    """The times of one side, in seconds: medians over steps and runs."""

    step_s: float
    decode_s: float
    sent_bytes: float  # in a step, by the device that sends most

    @classmethod
    def of(cls, runs: "list[_Run]") -> "Side":
        steps = [seconds for run in runs for seconds in run.steps]
        return cls(
            float(np.median(steps)), float(np.median([run.decode for run in runs])), max(run.sent for run in runs)
        )


@dataclass(frozen=True)
class Scaling:
    facts: dict[str, Any]
    split: str
    devices: int
    threads: int  # of a session, on a CPU; 0 on GPUs
    one: Side
    group: Side
    divides_vae: bool

    @property
    def speedup(self) -> float:
        return self.one.step_s / self.group.step_s

    @property
    def efficiency(self) -> float:
        return self.speedup / self.devices

    def as_text(self) -> list[RenderableType]:
        table = Table("", "one device", self.split, "speed-up", "efficiency", title=self.facts["work"])
        figures = [("step", self.one.step_s, self.group.step_s)]
        if self.divides_vae:
            figures.append(("decode", self.one.decode_s, self.group.decode_s))
        for name, one, group in figures:
            efficiency = f"{100 * one / group / self.devices:.0f} %"
            table.add_row(name, f"{1e3 * one:.1f} ms", f"{1e3 * group:.1f} ms", f"{one / group:.2f}x", efficiency)
        threads = f", {self.threads} to a session" if self.threads else ""
        return [table, f"{self.devices} devices{threads}; sent in a step: {human_bytes(self.group.sent_bytes)}"]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.facts,
            "parallel": self.split,
            "devices": self.devices,
            "threads_per_session": self.threads,
            "one_step_s": self.one.step_s,
            "group_step_s": self.group.step_s,
            "one_decode_s": self.one.decode_s,
            "group_decode_s": self.group.decode_s,
            "sent_per_step_bytes": self.group.sent_bytes,
            "speedup": self.speedup,
            "scaling_efficiency": self.efficiency,
        }


@dataclass(frozen=True)
class _Run:
    steps: list[float]
    decode: float
    sent: float


def bench_scaling(engines: Path, options: BenchOptions, progress: Progress) -> Scaling:
    """Time the devices that ``options`` name, and one of them.

    Raises:
        UserError: they name one device, or the engines cannot divide the work so.
    """
    bundle, several = open_bundle(engines, "engines"), options.blocks
    devices = check_options(bundle, several)
    if not devices.together:
        raise UserError("--gpus with one device", "several to compare with one", "name them as 0,1")
    if (steps := options.request.steps) is not None and steps < STEPS_AT_LEAST:
        raise UserError(f"--steps {steps} with --parallel", f"at least {STEPS_AT_LEAST}", "leave --steps out")
    alone = replace(several, parallel=None, gpus=str(devices.numbers[0]))
    on_cpu = bundle.manifest.build is not None and bundle.manifest.build.backend == "onnxruntime"
    threads = max(1, len(os.sched_getaffinity(0)) // devices.split.members) if on_cpu else 0
    work, load = work_for(bundle, options), load_average()
    opened = {"group": replace(options, blocks=several), "one": replace(options, blocks=alone)}
    rounds = [tuple(opened)] if on_cpu else [(name,) for name in opened]  # GPU 0 may not hold both
    runs: dict[str, list[_Run]] = {name: [] for name in opened}
    for number, names in enumerate(rounds):
        with ExitStack() as stack:
            sides = {name: _open(stack, bundle, opened[name], threads) for name in names}
            for done in range(options.runs + 1):
                for name, side in sides.items():
                    found = _run(side, work)
                    runs[name] += [found] if done else []  # the first is not timed
                progress("bench", number * (options.runs + 1) + done + 1, len(rounds) * (options.runs + 1), "runs")
    request = work.request
    video = video_text(request.width, request.height, request.frames)
    shown = f"{work.spec.name}, {bundle.manifest.precision_text}: {video}"
    facts = {
        "work": f"{shown}, {work.tokens:,} tokens",
        "model": work.spec.name,
        "tokens": work.tokens,
        "steps": request.steps,
        "machine": machine(),
        "load_average": [load, load_average()],
        "command": options.command,
    }
    one, group = Side.of(runs["one"]), Side.of(runs["group"])
    split = devices.split
    return Scaling(facts, str(split), split.members, threads, one, group, split.vae > 1)


def _open(stack: ExitStack, bundle: Bundle, options: BenchOptions, threads: int) -> Pipeline:
    """A pipeline whose sessions are open; those of a group have the number of their threads from their devices."""
    pipeline = stack.enter_context(Pipeline(bundle, residency=options.residency, blocks=options.blocks))
    alone = pipeline.backend.group is None
    with threads_of_sessions(threads if alone else 0):
        for name in (*pipeline.spec.experts, "vae_decoder_first", "vae_decoder_next"):
            if name in {component.name for component in bundle.manifest.components}:
                pipeline.load(name)
    return pipeline


def _run(pipeline: Pipeline, work: Work) -> _Run:
    """Denoise and decode; the first step of every expert is not counted, as it meets its prompts."""
    request, links = work.request, pipeline.backend.links
    for text in (texts := [work.text.copy(), 0.5 * work.text]):
        text.flags.writeable = False
    positive, negative = texts
    given = Conditions(positive, negative, work.condition, work.first_frame)
    spec, sampler = request.with_switch(pipeline.spec), request.sampler(pipeline.spec)
    seconds, sent, expert = list[float](), 0.0, ""
    before = [link.sent_bytes for link in links]
    for step in denoise(spec, pipeline.engine, request.initial_noise(), given, sampler):
        now = [link.sent_bytes for link in links]
        if step.expert == expert:
            seconds.append(step.seconds_total)
            sent = max([sent, *(after - was for after, was in zip(now, before, strict=True))])
        before, expert, latents = now, step.expert, step.latents
    velocity = latents.nbytes if pipeline.split.cfg > 1 and request.guided else 0
    decode = measure_time(lambda: [None for _ in pipeline.decode(latents)])[1]
    return _Run(seconds or [math.nan], decode, sent + velocity)
