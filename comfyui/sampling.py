"""The samplers: on engines of this machine, and on a server."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from runtime.arrays import F32
from runtime.noise import standard_normal
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.video import to_uint8
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError
from triton_repo.wire import inputs_of
from wan22.caching import Caching
from wan22.looks import LOOKS, with_terms
from wan22.sampling import NEGATIVE_PROMPT, PRESETS

from .latents import checked, exact, latent_of, png

CATEGORY = "wan-trt"
BUNDLES = "the bundle's"  # stands for a default
PREVIEW_PIXELS = 512


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


class Sampler:
    """Prompt and latents to latents, by both experts. Steps may be part of a run, as in KSampler (Advanced)."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "sample", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"engines": ("WAN_TRT_ENGINES",), **prompts(), "latent": ("LATENT",), **sampling()},
            "optional": {
                "condition": ("WAN_TRT_CONDITION",),
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


class RemoteSampler:
    """Prompt to images on a Triton server, started by ``wan-trt serve``; the engines are there."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "generate", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        side = {"default": 0, "min": 0, "max": 8192, "step": 16, "tooltip": "0: the engines' own."}
        return {
            "required": {
                "server": ("STRING", {"default": "localhost:8001"}),
                "model": ("STRING", {"default": "wan22"}),
                **prompts(),
                "width": ("INT", side),
                "height": ("INT", side),
                "frames": ("INT", {"default": 0, "min": 0, "max": 1001}),
                **sampling(),
            },
            "optional": {
                "image": ("IMAGE",),
                "last_image": ("IMAGE",),
                "lora": ("STRING", {"default": ""}),
            },
        }

    def generate(
        self,
        server: str,
        model: str,
        width: int,
        height: int,
        frames: int,
        image: Any = None,
        last_image: Any = None,
        lora: str = "",
        **given: Any,
    ) -> tuple[Any]:
        images = {name: png(x) for name, x in (("image", image), ("last_image", last_image)) if x is not None}
        request = replace(
            request_of(given, images),
            size=(width, height) if width and height else None,
            frames=frames or None,
            lora=lora or None,
        )
        settings = {**inputs_of(request), "output_format": "frames_npz", "preview": True}
        bar: Any = None
        with WanClient(server, model) as client:
            job = client.submit(settings)
            try:
                for event in job.events():
                    if event["phase"] == "denoise":
                        bar = bar or comfy.utils.ProgressBar(event["total"])
                        bar.update_absolute(event["step"], event["total"], _picture(event["preview"]))
                    comfy.model_management.throw_exception_if_processing_interrupted()
                video = job.result().video
            except JobError as error:
                raise error.reason from None
        with np.load(io.BytesIO(video)) as arrays:
            return (torch.from_numpy(arrays["frames"].astype(np.float32) / 255),)


def _picture(preview: bytes) -> tuple[str, Image.Image, int] | None:
    return ("JPEG", Image.open(io.BytesIO(preview)), PREVIEW_PIXELS) if preview else None
