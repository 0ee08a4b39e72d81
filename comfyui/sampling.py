"""The sampler on engines of this machine, and LoRAs for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from PIL import Image

from export.lora.merge import LoraChoice
from runtime.arrays import F32
from runtime.noise import standard_normal
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.video import to_uint8
from wan22.caching import Caching
from wan22.errors import UserError
from wan22.looks import LOOKS, with_terms
from wan22.sampling import NEGATIVE_PROMPT, PRESETS
from wan_trt.recipes.weight_sets import added_set

from .latents import checked, exact, latent_of

CATEGORY = "wan-trt"
BUNDLES = "the bundle's"  # stands for a default
PREVIEW_PIXELS = 512
EXPERTS = {"as the file says": None, "high noise": "high", "low noise": "low"}


def prompts() -> dict[str, Any]:
    return {
        "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True}),
        "negative_prompt": ("STRING", {"multiline": True, "default": NEGATIVE_PROMPT}),
    }


def sampling() -> dict[str, Any]:
    """Sampler settings; 0, -1 or "the bundle's" stand for the bundle's own."""
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
        "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the bundle's."}),
        "shift": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "0: the bundle's."}),
        "guidance": (
            "FLOAT",
            {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": "-1: the bundle's."},
        ),
        "guidance_low_noise": (
            "FLOAT",
            {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": "-1: as guidance."},
        ),
        "solver": ([BUNDLES, "unipc", "dpm++", "euler", "renoise"],),
        "preset": ([BUNDLES, *PRESETS],),
        "look": (["none", *LOOKS],),
        "cache": (["off", "easy"],),
    }


def request_of(given: dict[str, Any], images: dict[str, bytes]) -> Request:
    """The request of a sampler's inputs."""
    guidance, low = given["guidance"], given["guidance_low_noise"]
    looks = [] if given["look"] == "none" else [given["look"]]
    return Request(
        with_terms(given["prompt"], looks, image=bool(images)),
        given["negative_prompt"],
        seed=given["seed"],
        steps=given["steps"] or None,
        shift=given["shift"] or None,
        guidance_scale=guidance if guidance >= 0 else None,
        guidance={"low_noise": low} if low >= 0 else {},
        solver=None if given["solver"] == BUNDLES else given["solver"],
        preset=None if given["preset"] == BUNDLES else given["preset"],
        cache=Caching(easy=True) if given["cache"] == "easy" else None,
        fit="crop",
        **images,  # type: ignore[arg-type]
    )


class Lora:
    """A LoRA of ComfyUI's ``models/loras`` for the sampler; several follow each other."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "choose", ("WAN_TRT_LORA",), ("lora",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        moved = {"default": "", "tooltip": "Where the engines' checkpoint is now, if it has moved."}
        return {
            "required": {
                "file": (folder_paths.get_filename_list("loras") or ["none"],),
                "strength": ("FLOAT", strength),
                "expert": (list(EXPERTS),),
            },
            "optional": {"before": ("WAN_TRT_LORA",), "checkpoint": ("STRING", moved)},
        }

    def choose(
        self,
        file: str,
        strength: float,
        expert: str,
        before: tuple[str, list[LoraChoice]] | None = None,
        checkpoint: str = "",
    ) -> tuple[tuple[str, list[LoraChoice]]]:
        path = folder_paths.get_full_path("loras", file)
        if path is None:
            raise UserError(f"LoRA {file!r}", "a file in ComfyUI's models/loras", "put it there")
        known, choices = before or ("", [])
        return ((checkpoint or known, [*choices, LoraChoice(Path(path), strength, EXPERTS[expert])]),)


def weight_set(engines: Pipeline, checkpoint: str, choices: list[LoraChoice]) -> str:
    """The name of the weights with these LoRAs; made once, in ComfyUI's folder of temporary files."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    bars: dict[str, Any] = {}

    def progress(task: str, done: int, total: int, unit: str = "") -> None:  # noqa: ARG001
        comfy.model_management.throw_exception_if_processing_interrupted()
        bars.setdefault(task, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    return added_set(engines, choices, folder, checkpoint or None, progress)


class Sampler:
    """Prompt and latents to latents, by both experts. Steps may be part of a run, as in KSampler (Advanced)."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "sample", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"engines": ("WAN_TRT_ENGINES",), **prompts(), "latent": ("LATENT",), **sampling()},
            "optional": {
                "condition": ("WAN_TRT_CONDITION",),
                "lora": ("WAN_TRT_LORA",),
                "start_at_step": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "end_at_step": ("INT", {"default": 1000, "min": 1, "max": 1000}),
                "add_noise": ("BOOLEAN", {"default": True}),
                "preview": ("BOOLEAN", {"default": True}),
            },
        }

    def sample(
        self,
        engines: Pipeline,
        latent: dict[str, Any],
        condition: dict[str, Any] | None = None,
        lora: tuple[str, list[LoraChoice]] | None = None,
        start_at_step: int = 0,
        end_at_step: int = 1000,
        add_noise: bool = True,
        preview: bool = True,
        **given: Any,
    ) -> tuple[dict[str, Any]]:
        spec, samples = engines.spec, checked(latent, engines.spec)
        batch, _, frames, height, width = samples.shape
        stride = spec.vae.spatial_stride
        shared = replace(
            request_of(given, condition or {}),
            size=(width * stride, height * stride),
            frames=spec.vae.temporal_stride * (frames - 1) + 1,
            lora=None if lora is None else weight_set(engines, *lora),
        )
        noise = standard_normal(samples.shape, shared.seed) if add_noise else np.zeros_like(samples)
        complete = engines.complete(shared)
        sigmas, part = complete.noise_schedule().sigmas, range(start_at_step, min(end_at_step, complete.steps))
        sigma = sigmas[start_at_step] if 0 < start_at_step < len(sigmas) else np.float32(1)
        left = sigmas[max(part.stop, 0)]  # the noise that stays in the latents
        show, made = showing(engines if preview else None, len(part) * batch), []
        for one, of_one in zip(exact(latent, spec), noise, strict=True):
            start = sigma * of_one + (1 - sigma) * one
            request = replace(complete, noise=start[None].astype(np.float32))
            for step in engines.denoise(request, None if len(part) == complete.steps else part):
                show(len(made) * len(part) + step.index + 1, step.latents)
            made.append(step.latents / (1 - left) if left else step.latents)
        return (latent_of(np.concatenate(made), spec),)


def showing(pipeline: Pipeline | None, total: int) -> Callable[[int, F32], None]:
    """What takes the number of a step and its latents: ComfyUI's bar, with a picture by ``pipeline``; may interrupt."""
    bar = comfy.utils.ProgressBar(total)

    def show(done: int, latents: F32) -> None:
        picture = None
        if pipeline is not None:
            (frames,) = pipeline.decode(latents[:, :, :1])
            picture = ("JPEG", Image.fromarray(to_uint8(frames)[0]), PREVIEW_PIXELS)
        bar.update_absolute(done, total, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return show
