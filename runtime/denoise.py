"""The denoising loop, a generator: progress, timing, previews, cancellation and parity live in its caller.

A step is one forward with the prompt, one without it unless guidance is 1, and one move of the solver. What surrounds
the engine is float32 and small: classifier-free guidance, the solver, and for image to video on the 5B model the first
latent frame, which stays the image.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from runtime.arrays import F32, require_finite
from runtime.forward_inputs import constant_inputs, step_inputs
from runtime.schedule import Schedule
from runtime.solver import Solver
from wan22.errors import UserError
from wan22.specs import ModelSpec

# ``velocity = forward(latents=..., time_features=..., text=..., rope_cos=..., rope_sin=..., [condition=...])``
Forward = Callable[..., Any]
# Forwards by expert name, or a function that opens one; it is asked once per change of expert and may close the last.
Experts = Mapping[str, Forward] | Callable[[str], Forward]


@dataclass(frozen=True, eq=False)
class Conditions:
    """What steers a run. All float32."""

    positive: F32  # [1, 512, text_width], embeddings of the prompt, zeros after its last token
    negative: F32 | None = None  # the same of the negative prompt; not needed where guidance is 1
    condition: F32 | None = None  # [1, 20, T, h, w], mask and encoded image (I2V)
    first_frame: F32 | None = None  # [1, z, 1, h, w], the encoded image that latent frame 0 stays (TI2V)

    def require_finite(self) -> None:
        """Raises NonFiniteError, naming what of it is not."""
        named = {"embeddings of the prompt": self.positive, "embeddings of the negative prompt": self.negative}
        for what, x in (*named.items(), ("encoded image", self.condition), ("encoded image", self.first_frame)):
            if x is not None:
                require_finite(x, what)


@dataclass(frozen=True, eq=False)
class Step:
    index: int  # from 0
    total: int
    timestep: float
    expert: str
    latents: F32  # [1, z, T, h, w] after the step; not to be changed
    seconds_engine: float  # inside the forwards
    seconds_total: float  # the whole step, without opening the expert


def denoise(
    spec: ModelSpec,
    experts: Experts,
    latents: F32,
    given: Conditions,
    guidance: Mapping[str, float],
    schedule: Schedule,
    solver: Solver,
) -> Generator[Step, None, None]:
    """Yields after every step; the last one carries the finished latents.

    Args:
        spec: says which expert works at which timestep or step.
        experts: one forward is used at a time, so a function may keep one expert resident.
        latents: noise ``[1, z, T, h, w]``, left as it is.
        given: text and image.
        guidance: scale by expert name; at 1 the unconditional forward is not run.
        schedule: the timesteps.
        solver: a fresh one, made for this schedule.

    Raises:
        UserError: a guidance that is no finite number.
        NonFiniteError: a condition with NaN or infinity; a velocity, naming expert and step.
    """
    for name in spec.experts:
        if not math.isfinite(guidance[name]):
            raise UserError(f"guidance {guidance[name]} for {name}", "a finite number", "the models use 3 to 5")
        if guidance[name] != 1 and given.negative is None:
            raise ValueError(f"guidance {guidance[name]} for {name} needs embeddings of the negative prompt")
    given.require_finite()
    opened = experts.__getitem__ if isinstance(experts, Mapping) else experts
    return _steps(spec, opened, latents, given, guidance, schedule, solver)


def _steps(
    spec: ModelSpec,
    opened: Callable[[str], Forward],
    latents: F32,
    given: Conditions,
    guidance: Mapping[str, float],
    schedule: Schedule,
    solver: Solver,
) -> Generator[Step, None, None]:
    inputs, keeps_first = constant_inputs(spec.dit, latents, given.condition), given.first_frame is not None
    if given.first_frame is not None:
        latents = latents.copy()
        latents[:, :, :1] = given.first_frame
    expert, forward = "", None
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        if forward is None or spec.expert_at(timestep, index) != expert:
            expert, forward = spec.expert_at(timestep, index), None
            forward = opened(expert)
        started = perf_counter()
        inputs |= step_inputs(spec.dit, latents, timestep, clean_first_frame=keeps_first)
        velocity, seconds_engine = _guided_velocity(forward, inputs, given, guidance[expert])
        require_finite(velocity, f"velocity of {expert} in step {index + 1} of {schedule.steps} (t = {timestep:g})")
        latents = solver.step(velocity, latents)
        if given.first_frame is not None:
            latents[:, :, :1] = given.first_frame
        seconds_total = perf_counter() - started
        yield Step(index, schedule.steps, timestep, expert, latents, seconds_engine, seconds_total)


def _guided_velocity(forward: Forward, inputs: Mapping[str, F32], given: Conditions, scale: float) -> tuple[F32, float]:
    """``u + scale (c - u)`` in float32, and the seconds spent in the forwards; ``c`` alone where the scale is 1."""
    started = perf_counter()
    conditional: F32 = forward(**inputs, text=given.positive)
    if scale == 1:
        return conditional, perf_counter() - started
    unconditional: F32 = forward(**inputs, text=given.negative)
    seconds = perf_counter() - started
    velocity = conditional - unconditional
    velocity *= np.float32(scale)
    velocity += unconditional
    return velocity, seconds
