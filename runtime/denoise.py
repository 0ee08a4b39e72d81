"""The denoising loop as a generator: its caller handles progress, timing, previews, cancellation and parity.

A step is one forward with the prompt, one without it unless guidance is 1, and one solver step. The operations around
the engine are small and run in float32: classifier-free guidance, the solver and, for image to video on the 5B model,
resetting the first latent frame to the image.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from runtime.arrays import F32, require_finite
from runtime.forward_inputs import constant_inputs, step_inputs, time_features
from runtime.schedule import Schedule
from runtime.solver import Solver
from wan22.errors import UserError
from wan22.specs import ModelSpec

# ``velocity = forward(latents=..., time_features=..., text=..., rope_cos=..., rope_sin=..., [condition=...])``
Forward = Callable[..., Any]
# Forwards by expert name, or a function that opens one: it is called once per change of expert and may close the last.
Experts = Mapping[str, Forward] | Callable[[str], Forward]


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of a run, all float32."""

    positive: F32  # [1, 512, text_width], embeddings of the prompt, zeros after its last token
    negative: F32 | None = None  # embeddings of the negative prompt; not needed if guidance is 1
    condition: F32 | None = None  # [1, 20, T, h, w], mask and encoded image (I2V)
    first_frame: F32 | None = None  # [1, z, 1, h, w], the encoded image, kept as latent frame 0 (TI2V)

    def require_finite(self) -> None:
        """Require that all values are finite.

        Raises:
            NonFiniteError: names the condition that is not.
        """
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
    latents: F32  # [1, z, T, h, w] after the step; the caller must not change them
    seconds_engine: float  # time in the forwards
    seconds_total: float  # time of the whole step, except opening the expert


def denoise(
    spec: ModelSpec,
    experts: Experts,
    latents: F32,
    given: Conditions,
    guidance: Mapping[str, float],
    schedule: Schedule,
    solver: Solver,
) -> Generator[Step, None, None]:
    """Yield after every step; the last step holds the final latents.

    Args:
        spec: determines the expert of each timestep or step.
        experts: only one forward is used at a time, so a function may keep one expert resident.
        latents: noise ``[1, z, T, h, w]``, not modified.
        given: text and image.
        guidance: scale by expert name; 1 skips the unconditional forward.
        schedule: the timesteps.
        solver: a new one, made for this schedule.

    Raises:
        UserError: a guidance scale is not finite.
        NonFiniteError: a condition or a velocity holds NaN or infinity; for a velocity, names expert and step.
    """
    for name in spec.experts:
        if not math.isfinite(guidance[name]):
            raise UserError(f"guidance {guidance[name]} for {name}", "a finite number", "the models use 3 to 5")
        if guidance[name] != 1 and given.negative is None:
            raise ValueError(f"guidance {guidance[name]} for {name} needs embeddings of the negative prompt")
    given.require_finite()
    open_expert = experts.__getitem__ if isinstance(experts, Mapping) else experts
    return _steps(spec, open_expert, latents, given, guidance, schedule, solver)


def _steps(
    spec: ModelSpec,
    open_expert: Callable[[str], Forward],
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
            forward = open_expert(expert)
            _prepare(forward, spec, schedule)
        started = perf_counter()
        inputs |= step_inputs(spec.dit, latents, timestep, clean_first_frame=keeps_first)
        following = min(index + 1, schedule.steps - 1)
        then = spec.expert_at(float(schedule.timesteps[following]), following)
        velocity, seconds_engine = _guided_velocity(forward, inputs, given, guidance[expert], then)
        require_finite(velocity, f"velocity of {expert} in step {index + 1} of {schedule.steps} (t = {timestep:g})")
        latents = solver.step(velocity, latents)
        if given.first_frame is not None:
            latents[:, :, :1] = given.first_frame
        seconds_total = perf_counter() - started
        yield Step(index, schedule.steps, timestep, expert, latents, seconds_engine, seconds_total)


def _prepare(forward: Forward, spec: ModelSpec, schedule: Schedule) -> None:
    """Let a forward that can do so compute the time rows of all steps at once."""
    if (prepare := getattr(forward, "prepare", None)) is not None:
        clean = [0.0] if spec.dit.time_rows > 1 else []
        prepare(time_features([*clean, *schedule.timesteps.tolist()], spec.dit.freq_width))


def _guided_velocity(
    forward: Forward, inputs: Mapping[str, F32], given: Conditions, scale: float, then: str
) -> tuple[F32, float]:
    """``u + scale (c - u)`` in float32, or ``c`` if the scale is 1, and the seconds spent in the forwards.

    The last forward hears of the expert of the next step, ``then``, if it can bring its weights early.
    """
    started, follow = perf_counter(), getattr(forward, "follow", lambda _expert: None)
    if scale == 1:
        follow(then)
    conditional: F32 = forward(**inputs, text=given.positive)
    if scale == 1:
        return conditional, perf_counter() - started
    follow(then)
    unconditional: F32 = forward(**inputs, text=given.negative)
    seconds = perf_counter() - started
    velocity = conditional - unconditional
    velocity *= np.float32(scale)
    velocity += unconditional
    return velocity, seconds
