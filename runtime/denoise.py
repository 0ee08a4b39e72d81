"""The denoising loop as a generator: its caller handles progress, timing, previews, cancellation and parity.

A step is one forward with the prompt, one without it unless guidance is 1, and one solver step; a step cache may
estimate forwards. The operations around the engine are small and run in float32: classifier-free guidance, the solver
and, for image to video on the 5B model, resetting the first latent frame to the image.
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
from runtime.step_cache import StepCache
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
class Sampler:
    """How a run moves from noise to clean latents; it serves one run."""

    schedule: Schedule
    solver: Solver  # a new one, made for the schedule
    guidance: Mapping[str, float]  # by expert name; 1 skips the unconditional forward
    cache: StepCache | None = None


@dataclass(frozen=True, eq=False)
class Step:
    index: int  # from 0
    total: int
    timestep: float
    expert: str
    latents: F32  # [1, z, T, h, w] after the step; the caller must not change them
    seconds_engine: float  # time in the forwards
    seconds_total: float  # time of the whole step, except opening the expert
    cached: bool = False  # no forward: the velocity is an estimate
    late_cfg: bool = False  # no unconditional forward: the guidance is an estimate
    cache_error: float = math.nan  # the accumulated change by which EasyCache decided, NaN where it did not
    cache_gain: float = math.nan  # change of the velocity over that of the latents, as EasyCache knew it


def denoise(
    spec: ModelSpec, experts: Experts, latents: F32, given: Conditions, sampler: Sampler
) -> Generator[Step, F32 | None, None]:
    """Yield after every step; the last step holds the final latents. Latents that are sent replace those of the step.

    Args:
        spec: determines the expert of each timestep or step.
        experts: only one forward is used at a time, so a function may keep one expert resident.
        latents: noise ``[1, z, T, h, w]``, not modified.
        given: text and image.
        sampler: schedule, solver, guidance and step cache.

    Raises:
        UserError: a guidance scale is not finite.
        NonFiniteError: a condition or a velocity holds NaN or infinity; for a velocity, names expert and step.
    """
    guidance = sampler.guidance
    for name in spec.experts:
        if not math.isfinite(guidance[name]):
            raise UserError(f"guidance {guidance[name]} for {name}", "a finite number", "the models use 3 to 5")
        if guidance[name] != 1 and given.negative is None:
            raise ValueError(f"guidance {guidance[name]} for {name} needs embeddings of the negative prompt")
    given.require_finite()
    open_expert = experts.__getitem__ if isinstance(experts, Mapping) else experts
    return _steps(spec, open_expert, latents, given, sampler)


def _steps(
    spec: ModelSpec, open_expert: Callable[[str], Forward], latents: F32, given: Conditions, sampler: Sampler
) -> Generator[Step, F32 | None, None]:
    inputs, keeps_first = constant_inputs(spec.dit, latents, given.condition), given.first_frame is not None
    if given.first_frame is not None:
        latents = latents.copy()
        latents[:, :, :1] = given.first_frame
    schedule, cache, expert, forward = sampler.schedule, sampler.cache, "", None
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        if forward is None or spec.expert_at(timestep, index) != expert:
            expert, forward = spec.expert_at(timestep, index), None
            forward = open_expert(expert)
            _prepare(forward, spec, schedule)
        started = perf_counter()
        cached, late, seconds_engine = cache is not None and cache.skips(index), False, 0.0
        if cache is not None and cached:
            velocity = cache.estimate(index, latents)
        else:
            inputs |= step_inputs(spec.dit, latents, timestep, clean_first_frame=keeps_first)
            residual = cache.residual(index) if cache is not None else None
            then = spec.expert_at(*_following(schedule, index))
            found = _guided_velocity(forward, inputs, given, sampler.guidance[expert], residual, then)
            conditional, velocity, seconds_engine = found
            require_finite(velocity, f"velocity of {expert} in step {index + 1} of {schedule.steps} (t = {timestep:g})")
            late = residual is not None
            if cache is not None:
                cache.observe(index, latents, conditional, velocity)
        before, latents = latents, sampler.solver.step(velocity, latents)
        if given.first_frame is not None:
            latents[:, :, :1] = given.first_frame
        easy = cache.easy if cache is not None else None
        decision = (easy.error, easy.gain) if easy else ()
        if cache is not None:
            cache.moved(before, latents)
        seconds_total = perf_counter() - started
        sent = yield Step(
            index, schedule.steps, timestep, expert, latents, seconds_engine, seconds_total, cached, late, *decision
        )
        latents = latents if sent is None else sent


def _prepare(forward: Forward, spec: ModelSpec, schedule: Schedule) -> None:
    """Let a forward that can do so compute the time rows of all steps at once."""
    if (prepare := getattr(forward, "prepare", None)) is not None:
        clean = [0.0] if spec.dit.time_rows > 1 else []
        prepare(time_features([*clean, *schedule.timesteps.tolist()], spec.dit.freq_width))


def _following(schedule: Schedule, index: int) -> tuple[float, int]:
    """Timestep and index of the next step; of the last one if there is no next."""
    following = min(index + 1, schedule.steps - 1)
    return float(schedule.timesteps[following]), following


def _guided_velocity(
    forward: Forward, inputs: Mapping[str, F32], given: Conditions, scale: float, residual: F32 | None, then: str
) -> tuple[F32, F32, float]:
    """The conditional velocity ``c``, ``u + scale (c - u)`` in float32, and the seconds spent in the forwards.

    The guided velocity is ``c`` itself if the scale is 1, and ``c + residual`` if there is an estimate of the residual.
    The last forward hears of the expert of the next step, ``then``, if it can bring its weights early. A forward on
    several devices may compute both branches at once.
    """
    started, follow = perf_counter(), getattr(forward, "follow", lambda _expert: None)
    both = getattr(forward, "both", None) if scale != 1 and residual is None else None
    if both is not None:
        follow(then)
        conditional, unconditional = both(inputs, given.positive, given.negative)
        seconds = perf_counter() - started
        return conditional, _guided(conditional, unconditional, scale), seconds
    if scale == 1 or residual is not None:
        follow(then)
    conditional = forward(**inputs, text=given.positive)
    if scale == 1:
        return conditional, conditional, perf_counter() - started
    if residual is not None:
        seconds = perf_counter() - started
        return conditional, conditional + residual, seconds
    follow(then)
    unconditional = forward(**inputs, text=given.negative)
    seconds = perf_counter() - started
    return conditional, _guided(conditional, unconditional, scale), seconds


def _guided(conditional: F32, unconditional: F32, scale: float) -> F32:
    velocity = conditional - unconditional
    velocity *= np.float32(scale)
    velocity += unconditional
    return velocity
