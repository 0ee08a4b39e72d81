"""The sampler's overhead outside the transformer: solver, guidance and checks on GPU arrays."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from runtime.denoise import Conditions, Sampler, denoise
from runtime.noise import standard_normal
from runtime.schedule import make_schedule
from runtime.solver import make_solver
from studies.gpu.stage import Measurement, StageSettings
from studies.gpu.timing import median_ms
from wan22.sampling import SolverName
from wan22.specs import ModelSpec, spec_named

SOLVERS: tuple[SolverName, ...] = ("unipc", "dpm++", "euler")
STEPS, RUNS = 40, 3


def overhead(setting: StageSettings) -> Iterator[Measurement]:
    """Time per step of runs at 720p whose transformer returns immediately."""
    xp = np if setting.dry_run else import_module("cupy")
    spec, video = spec_named("t2v-a14b"), (64, 64, 5) if setting.dry_run else (1280, 720, 81)
    noise = xp.asarray(standard_normal(spec.latent_shape(*video), setting.seed))
    for solver in SOLVERS:
        per_step = median_ms("cpu", partial(_run, xp, spec, noise, solver), RUNS) / STEPS
        yield Measurement(f"{xp.__name__} {solver}", per_step, "ms a step", "{}x{}, {} frames".format(*video))


def _run(xp: Any, spec: ModelSpec, noise: Any, name: SolverName) -> None:
    """Run and wait until the device has finished."""
    answer = 0.1 * noise
    experts = {expert: lambda **_: answer for expert in spec.experts}
    schedule = make_schedule(name, STEPS, spec.sampling.shift, "official")
    sampler = Sampler(schedule, make_solver(name, schedule), spec.sampling.guidance)
    text = xp.zeros(1)  # goes to the transformer only
    for step in denoise(spec, experts, noise, Conditions(text, text), sampler):
        latents = step.latents
    float(latents.ravel()[0])
