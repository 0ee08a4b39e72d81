"""Our side of the comparison: the runtime's pipeline behind the interface of the reference."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from runtime.arrays import F32
from runtime.denoise import Step
from runtime.forward_inputs import forward_inputs, time_features
from runtime.image_condition import Fit, fit_image
from runtime.pipeline import Pipeline
from runtime.request import CompleteRequest
from runtime.solver import make_solver
from validate.reference.parts import I64
from validate.reference.reference import NO_IMAGE, ImageInputs


class EnginesSide:
    """The engines of an open pipeline. Each method returns what the reference's method of the same name returns."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._dit = pipeline, pipeline.spec.dit

    def token_ids(self, prompt: str) -> I64:
        return self._pipeline.tokenizer.encode(prompt, allow_empty=True).ids

    def embeddings(self, prompt: str) -> F32:
        """Embeddings ``[1, 512, width]`` of the prompt, which our tokenizer encodes."""
        return self._pipeline.text(prompt, allow_empty=True)

    def sigmas_and_timesteps(self, request: CompleteRequest) -> tuple[F32, F32]:
        schedule = request.noise_schedule()
        return schedule.sigmas, schedule.timesteps

    def noise(self, request: CompleteRequest) -> F32:
        return request.initial_noise()

    def time_features(self, timesteps: Sequence[float]) -> F32:
        """``[steps, freq_width]``."""
        return time_features(timesteps, self._dit.freq_width)

    def pixels(self, image: Image.Image, size: tuple[int, int], fit: Fit) -> F32:
        """``[1, 3, H, W]``."""
        return fit_image(image, self._pipeline.spec.takes.resizing, size, fit)[:, :, 0]

    def encode(self, video: F32) -> F32:
        """Normalised latents of frames ``[1, 3, F, H, W]``, encoded chunk by chunk."""
        return self._pipeline.encode(video)

    def image_inputs(self, request: CompleteRequest) -> ImageInputs:
        return ImageInputs(**self._pipeline.image_condition(request))

    def velocity(
        self, expert: str, latents: F32, timestep: float, text: F32, image_inputs: ImageInputs = NO_IMAGE
    ) -> F32:
        clean = image_inputs.first_frame is not None
        inputs = forward_inputs(self._dit, latents, timestep, text, image_inputs.condition, clean_first_frame=clean)
        return np.asarray(self._pipeline.engine(expert)(**inputs))

    def run(self, request: CompleteRequest) -> Iterator[Step]:
        return self._pipeline.denoise(request)

    def solve(
        self, request: CompleteRequest, start: F32, velocities: Iterable[F32], first_frame: F32 | None = None
    ) -> Iterator[F32]:
        """Yield the latents after every step of our solver on ``velocities``, from ``start``.

        ``first_frame`` is restored after each step.
        """
        schedule = request.noise_schedule()
        solver, latents = make_solver(request.solver, schedule, request.seed), start
        for velocity in velocities:
            latents = solver.step(velocity, latents)
            if first_frame is not None:
                latents[:, :, :1] = first_frame
            yield latents

    def decode(self, latents: F32) -> F32:
        return np.concatenate(list(self._pipeline.decode(latents)), axis=2)
