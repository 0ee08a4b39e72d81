"""The pipeline: diffusers' arguments become requests, frames of the engines its output."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import numpy as np

from runtime.arrays import F32
from runtime.block_backend import BlockOptions
from runtime.pipeline import Pipeline
from runtime.request import Request
from wan22.block_memory import WeightsIn
from wan22.errors import UserError
from wan22.progress import silent
from wan22.quantities import parse_bytes
from wan22.residency import ResidencyChoice
from wan22.specs import TEXT_TOKENS
from wan_trt.console import bars
from wan_trt.diffusers.loras import LoraLoader
from wan_trt.diffusers.scheduler import Config, scheduler_of, settings_of
from wan_trt.diffusers.values import (
    as_array,
    as_tensor,
    check_counts,
    check_numbers,
    frames_of,
    in_form,
    is_tensor,
    noises_of,
    png_of,
    texts_of,
)

log = logging.getLogger(__name__)

OutputType = Literal["np", "pil", "pt", "latent"]
# Called after a step with the pipeline, its index, its timestep and {"latents": ...}; returns what replaces them.
StepCallback = Callable[["WanTrtPipeline", int, float, dict[str, Any]], Mapping[str, Any]]
PARTS = ("vae", "text_encoder", "tokenizer", "transformer", "transformer_2", "image_encoder", "image_processor")
NO_EFFECT = ("torch_dtype", "dtype", "device_map", "variant", "use_safetensors", "low_cpu_mem_usage")


@dataclass(frozen=True, eq=False)
class WanPipelineOutput:
    """The videos.

    ``frames`` is, by ``output_type``: for "np" [videos, frames, height, width, 3] from 0 to 1, for "pt" [videos,
    frames, 3, height, width], for "pil" a list of pictures per video, for "latent" the clean latents
    [videos, z, T, h, w].
    """

    frames: Any


class WanTrtPipeline(LoraLoader):
    """Text, or text and an image, to videos by the engines of a bundle.

    Its call takes:

    * ``prompt``: a text, or one per video; ``negative_prompt``: one for all or one per prompt, None for none.
    * ``height``, ``width``: pixels, both or neither. An image is stretched to them.
    * ``num_frames``: rounded down to a multiple of 4 plus 1, with a warning. ``num_inference_steps``.
    * ``guidance_scale``: of the high-noise expert, and of the other unless ``guidance_scale_2`` is given. None up to 1.
    * ``generator``: a ``torch.Generator``, one per video, or an int as seed; None draws a seed.
    * ``latents``: the initial noise [videos, z, T, h, w], array or tensor, instead of the generator's.
    * ``output_type``: see :class:`WanPipelineOutput`; ``return_dict=False`` returns ``(frames,)``.
    * ``callback_on_step_end``: may replace the latents; ``pipe._interrupt = True`` in it ends the run after the step.
    * ``image``, ``last_image``: a picture, a path, an array [height, width, 3] (bytes, or floats from 0 to 1) or a
      tensor [3, height, width] from 0 to 1.

    ``close`` or the end of a ``with`` block frees the engines.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Take the engines of ``pipeline``."""
        super().__init__()
        self.pipeline = pipeline
        spec = pipeline.spec
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = 4, spec.size_multiple // 2
        self.transformer = SimpleNamespace(config=Config(patch_size=(1, 2, 2), in_channels=spec.dit.in_channels))
        self.scheduler = self._usual_scheduler = scheduler_of(spec.sampling.solver, spec.sampling.shift)
        self._interrupt, self._quiet = False, False
        self.num_timesteps, self.guidance_scale = 0, 1.0

    @classmethod
    def from_pretrained(
        cls,
        engines: str | Path,
        *,
        scheduler: Any = None,
        residency: ResidencyChoice = "auto",
        weights_in: WeightsIn = "auto",
        vram: str | None = None,
        gpus: str | None = None,
        parallel: str | None = None,
        checkpoint: str | None = None,
        **unused: Any,
    ) -> Self:
        """Open the engine bundle ``engines``, a folder made by ``wan-trt build``. Engines load on first use.

        Args:
            engines: the folder.
            scheduler: as for ``pipe.scheduler = ...``.
            residency: which engines stay loaded, as ``--residency``.
            weights_in: where weights of engines in blocks rest, as ``--weights-in``.
            vram: memory for a transformer in blocks, such as "8GiB".
            gpus: the devices, such as "0,1".
            parallel: how they divide the work, as ``--parallel``.
            checkpoint: the engines' checkpoint, for LoRAs, if it has moved.
            unused: arguments of diffusers. Modules, such as ``vae``, are left out with a warning.

        Raises:
            UserError: no engine bundle there, or an argument that diffusers does not have either.
        """
        for name in unused:
            if name in PARTS:
                log.warning("%s is left out: the engines in %s have their own", name, engines)
            elif name not in NO_EFFECT:
                ours = "scheduler, residency, weights_in, vram, gpus, parallel, checkpoint"
                expected = f"{ours}, or an argument of diffusers without effect here"
                raise UserError(f"from_pretrained({name}=...)", expected, "leave it out")
        budget = None if vram is None else parse_bytes(vram, "vram")
        blocks = BlockOptions(weights_in, budget, gpus=gpus, parallel=parallel)
        pipe = cls(Pipeline.open(Path(engines), residency=residency, blocks=blocks))
        pipe.checkpoint = checkpoint
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines."""
        self.pipeline.__exit__()
        if self._sets is not None:
            self._sets.cleanup()

    def to(self, *_: Any, **__: Any) -> Self:
        """Return the pipeline: the engines' target is their device."""
        return self

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Do nothing: ``residency="auto"`` keeps as many engines loaded as fit."""

    def set_progress_bar_config(self, *, disable: bool = False, **_: Any) -> None:
        """Show a bar over the steps on a terminal, or none."""
        self._quiet = disable

    @property
    def interrupt(self) -> bool:
        """True once a callback has set ``pipe._interrupt``: no further step runs, and what is there is decoded."""
        return self._interrupt

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = TEXT_TOKENS,
        *,
        image: Any = None,
        last_image: Any = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate the videos of one prompt or of several, one after the other.

        Raises:
            UserError: an argument that the engines or the model do not support.
        """
        _check_names(prompt, output_type, callback_on_step_end_tensor_inputs, max_sequence_length)
        check_counts(
            height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
        )  # fmt: skip
        prompts = texts_of("prompt", prompt)
        shared = Request(
            size=_size(width, height),
            frames=_rounded_frames(num_frames),
            image=png_of(image, width, height),
            last_image=png_of(last_image, width, height),
            fit="official" if width is None else "crop",
            steps=num_inference_steps,
            guidance=self._guidance(guidance_scale, guidance_scale_2),
            lora=self._lora(),
            **self._schedule(),
        )
        texts = zip(prompts, _one_each(negative_prompt, prompts), strict=True)
        requests = [replace(shared, prompt=text, negative_prompt=negative) for text, negative in texts]
        requests = [request for request in requests for _ in range(num_videos_per_prompt)]
        shape = self.pipeline.complete(requests[0]).latent_shape
        tensors = output_type == "pt" or is_tensor(generator) or is_tensor(latents)
        self._interrupt, made = False, []
        for request, noise in zip(requests, noises_of(shape, len(requests), generator, latents), strict=True):
            clean = self._denoised(replace(request, noise=noise), callback_on_step_end, tensors=tensors)
            made.append(clean if output_type == "latent" else frames_of(self.pipeline.decode(clean)))
        frames = in_form(made, output_type, tensors=tensors)
        return WanPipelineOutput(frames) if return_dict else (frames,)

    def _denoised(self, request: Request, callback: StepCallback | None, *, tensors: bool) -> F32:
        """The latents after the last step, or after that in which ``callback`` set ``_interrupt``."""
        steps, replaced = self.pipeline.denoise(self.pipeline.complete(request)), None
        with nullcontext(silent) if self._quiet or not sys.stderr.isatty() else bars(to_stderr=True) as progress:
            while not self._interrupt:
                try:
                    step = next(steps) if replaced is None else steps.send(replaced)
                except StopIteration:
                    break
                self.num_timesteps, latents, replaced = step.total, step.latents, None
                progress("denoise", step.index + 1, step.total, "steps")
                if callback is not None:
                    given = as_tensor(latents.copy()) if tensors else latents.copy()
                    found = as_array(
                        (callback(self, step.index, step.timestep, {"latents": given}) or {}).get("latents", given)
                    )
                    if found.shape != latents.shape:
                        expected = f"{list(latents.shape)}, as given"
                        raise UserError(f"latents {list(found.shape)} of a callback", expected, "keep the shape")
                    if not np.array_equal(found, latents):
                        latents = replaced = found
        return latents

    def _guidance(self, scale: float | None, scale_2: float | None) -> dict[str, float]:
        experts = self.pipeline.spec.experts
        check_numbers(guidance_scale=scale, guidance_scale_2=scale_2)
        if scale is None and scale_2 is not None:
            raise UserError("guidance_scale_2 alone", "guidance_scale too", "give both")
        if scale_2 is not None and len(experts) == 1:
            raise UserError(f"guidance_scale_2 for {self.pipeline.spec.name}", "a model of two experts", "leave it out")
        if scale is None:
            return {}
        self.guidance_scale = scale
        if scale <= 1:  # diffusers then leaves guidance out for both
            return dict.fromkeys(experts, 1.0)
        return dict(zip(experts, (scale, scale if scale_2 is None else scale_2), strict=False))

    def _schedule(self) -> dict[str, Any]:
        """Solver, shift and grid: the bundle's on diffusers' grid, until somebody sets ``scheduler``."""
        if self.scheduler is not self._usual_scheduler:
            return settings_of(self.scheduler)
        return {"schedule": "diffusers"} if self.pipeline.spec.sampling.preset == "official" else {}


def _check_names(prompt: Any, output_type: str, tensor_inputs: Sequence[str], max_sequence_length: int) -> None:
    if prompt is None:
        raise UserError("no prompt", "a text or a list of texts; embeddings are not taken", "describe a video")
    if output_type not in ("np", "pil", "pt", "latent"):
        raise UserError(f"output_type {output_type!r}", "np, pil, pt or latent", "choose one of these")
    if list(tensor_inputs) != ["latents"]:
        found = f"callback_on_step_end_tensor_inputs {tensor_inputs!r}"
        raise UserError(found, '["latents"]', "leave it out")
    if max_sequence_length != TEXT_TOKENS:
        raise UserError(f"max_sequence_length {max_sequence_length}", f"{TEXT_TOKENS}", "leave it out")


def _size(width: int | None, height: int | None) -> tuple[int, int] | None:
    if width is not None and height is not None:
        return width, height
    if width is not None or height is not None:
        raise UserError(f"width {width} and height {height}", "both or neither", "give both")
    return None


def _rounded_frames(frames: int | None) -> int | None:
    if frames is None or frames % 4 == 1:
        return frames
    rounded = max(frames // 4 * 4 + 1, 1)
    log.warning("num_frames %d is not a multiple of 4 plus 1: %d", frames, rounded)
    return rounded


def _one_each(negative: str | Sequence[str] | None, prompts: Sequence[str]) -> list[str]:
    alone = negative is None or isinstance(negative, str)
    given = [str(negative or "")] * len(prompts) if alone else texts_of("negative_prompt", negative)
    if len(given) != len(prompts):
        raise UserError(f"{len(given)} negative prompts", f"one, or {len(prompts)} as prompts", "give as many")
    return given
