"""An end-to-end run of the PyTorch side: diffusers' schedulers, the reference's models, noise from a torch generator.

diffusers does not have the official schedule (wan22.md §5.2), but its UniPC and Euler schedulers accept a grid of
sigmas, and the official grid yields the official schedule. Its DPM++ accepts none, so its sigmas and timesteps are
overwritten. ``set_begin_index`` makes the schedulers count steps. Otherwise they look up a step by its timestep, which
is ambiguous: in a long, strongly shifted schedule an integer timestep occurs twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from runtime.request import CompleteRequest
from validate.reference.checkpoint import expert_of
from validate.reference.listed_cache import ListedCache
from validate.reference.parts import F32, I64
from validate.reference.reference import NO_IMAGE, ImageInputs, Reference
from wan22.sampling import SolverName
from wan22.specs import TRAIN_TIMESTEPS


@dataclass(frozen=True)
class ReferenceStep:
    """Step ``index`` of the reference's run: latents ``[1, z, T, h, w]`` before and after it, guided velocity."""

    index: int
    timestep: float
    expert: str
    before: F32
    after: F32
    velocity: F32
    problem: str = ""  # names the first tensor of this step with NaN or infinity


class Models(Protocol):
    """The interface that a run of the reference needs."""

    boundary: float | None  # from the checkpoint

    def velocity(self, expert: str, latents: F32, timestep: float, text: F32, image_inputs: ImageInputs = ...) -> F32:
        """See :meth:`validate.reference.reference.Reference.velocity`."""


def initial_noise(request: CompleteRequest) -> F32:
    """The initial latents: the request's own, or those of torch's CPU generator."""
    if request.noise is not None:
        return request.noise
    generator = torch.Generator("cpu").manual_seed(request.seed)
    values: F32 = torch.randn(request.latent_shape, generator=generator).numpy()
    return values


def run(
    reference: Reference,
    request: CompleteRequest,
    text: F32,
    negative: F32 | None,
    image_inputs: ImageInputs = NO_IMAGE,
) -> Iterator[ReferenceStep]:
    """Run :func:`guided_run` with diffusers' scheduler."""
    scheduler = scheduler_for(request)
    fresh = torch.Generator("cpu").manual_seed((request.seed + 1) % 2**64)
    drawing = {"generator": fresh} if request.solver == "renoise" else {}

    def step(velocity: F32, index: int, latents: F32) -> F32:
        tensors = torch.from_numpy(velocity), scheduler.timesteps[index], torch.from_numpy(latents)
        stepped: F32 = scheduler.step(*tensors, return_dict=False, **drawing)[0].numpy()
        return stepped

    cache = None if request.cache is None else ListedCache(request.cache, scheduler.sigmas[:-1].tolist())
    return guided_run(reference, request, scheduler.timesteps.tolist(), step, (text, negative), image_inputs, cache)


def guided_run(
    models: Models,
    request: CompleteRequest,
    timesteps: Sequence[float],
    step: Callable[[F32, int, F32], F32],
    texts: tuple[F32, F32 | None],
    image_inputs: ImageInputs,
    cache: ListedCache | None = None,
) -> Iterator[ReferenceStep]:
    """Denoise from noise and yield every step. A clean first frame is restored after each, as in the official code.

    Args:
        models: compute the velocities.
        request: seed, shape and guidance of the run.
        timesteps: one per step.
        step: returns the latents after a step from the velocity, the index and the latents before it.
        texts: embeddings ``[1, 512, text width]`` of the prompt and of the negative prompt; None without guidance.
        image_inputs: what the image adds to the inputs; empty for text to video.
        cache: replaces the velocities of listed steps by estimates.
    """
    text, negative = texts
    latents = _with_first_frame(initial_noise(request), image_inputs)
    for index, t in enumerate(map(float, timesteps)):
        expert = expert_of(models.boundary, request, index, t)
        scale, estimates = request.guidance[expert], cache.skipped(index, expert, latents) if cache else None
        unconditional: F32 | None
        if estimates is not None:
            velocity, unconditional = estimates
        else:
            velocity, unconditional = models.velocity(expert, latents, t, text, image_inputs), None
            if negative is not None and scale != 1:
                unconditional = cache.unconditional(index, velocity, scale) if cache else None
                if unconditional is None:
                    unconditional = models.velocity(expert, latents, t, negative, image_inputs)
            if cache:
                cache.keep(index, latents, velocity, unconditional, scale)
        problem = "" if np.isfinite(velocity).all() else _describe_problem(f"velocity of {expert}", index, request, t)
        if unconditional is not None:
            velocity = unconditional + np.float32(scale) * (velocity - unconditional)
        after = _with_first_frame(step(velocity, index, latents), image_inputs)
        if not problem and not np.isfinite(after).all():
            problem = _describe_problem("latents", index, request, t)
        yield ReferenceStep(index, t, expert, latents, after, velocity, problem)
        latents = after


def _describe_problem(tensor: str, index: int, request: CompleteRequest, timestep: float) -> str:
    return f"reference: {tensor} in step {index + 1} of {request.steps} (t = {timestep:g}) has NaN or infinity"


def _with_first_frame(latents: F32, image_inputs: ImageInputs) -> F32:
    if image_inputs.first_frame is None:
        return latents
    return np.concatenate([image_inputs.first_frame, latents[:, :, 1:]], axis=2)


def scheduler_for(request: CompleteRequest) -> Any:
    """A diffusers scheduler with ``.sigmas`` [N+1] and ``.timesteps`` [N] set for this run."""
    official, steps = request.schedule == "official", request.steps
    scheduler = _scheduler(request.solver, 1.0 if request.sigmas else request.shift)
    if request.sigmas and request.solver == "dpm++":
        scheduler.set_timesteps(len(request.sigmas))
        _overwrite(scheduler, np.array(request.sigmas), 1.0)
    elif request.sigmas:
        scheduler.set_timesteps(sigmas=np.array(request.sigmas))
    elif not official:
        scheduler.set_timesteps(steps)
    elif request.solver == "unipc":
        top = float(np.float32(1 - 1 / TRAIN_TIMESTEPS))  # the official code reads this value from a float32 table
        scheduler.set_timesteps(sigmas=np.linspace(top, 0, steps + 1)[:-1])
    elif request.solver in ("euler", "renoise"):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    else:
        scheduler.set_timesteps(steps)
        _overwrite(scheduler, np.linspace(1, 0, steps + 1)[:-1], request.shift)
    scheduler.set_begin_index(0)
    return scheduler


def _scheduler(solver: SolverName, shift: float) -> Any:
    import diffusers

    if solver in ("euler", "renoise"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=solver == "renoise")
    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}[solver]
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _overwrite(scheduler: Any, grid: np.ndarray, shift: float) -> None:
    """Set the sigmas to the shifted ``grid`` (float64), and the timesteps to their truncated integers."""
    sigmas = shift * grid / (1 + (shift - 1) * grid)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy((sigmas * TRAIN_TIMESTEPS).astype(np.int64))


def sigmas_and_timesteps(request: CompleteRequest) -> tuple[F32, F32 | I64]:
    """Sigmas [N+1] and timesteps [N] of the reference; timesteps are integers for UniPC and DPM++."""
    scheduler = scheduler_for(request)
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy()
