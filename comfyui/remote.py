"""The sampler on a server of another machine: Triton, or a gateway in front of it."""

import io
import os
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any

import av
import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from gateway.client import GatewayClient, RefusedError
from triton_repo.client import WanClient
from triton_repo.client_errors import JobError
from triton_repo.wire import inputs_of
from wan22.errors import UserError
from wan_trt.recipes.batch.servers import KEY_VARIABLE, fields_of

from .latents import png
from .sampling import CATEGORY, PREVIEW_PIXELS, prompts, request_of, sampling


class RemoteSampler:
    """Prompt to images on a Triton server (HOST:PORT) or a gateway (http://HOST:PORT); the engines are there.

    A gateway's frames come out of an mp4 of the best quality, a Triton server's are exact.
    """

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
        if server.startswith(("http://", "https://")):
            return (torch.from_numpy(through_gateway(server, model, inputs_of(request)).astype(np.float32) / 255),)
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


def through_gateway(url: str, model: str, inputs: dict[str, Any]) -> np.ndarray:
    """The frames [frames, height, width, 3] of a job at a gateway, whose key is in WAN_TRT_KEY."""
    client, bar = GatewayClient(url, os.environ.get(KEY_VARIABLE, "")), None
    given = {name: value for name, value in inputs.items() if value is not None}
    try:
        video_id = client.create({**fields_of(given, model), "quality": 10, "preview": True}, uuid.uuid4().hex)["id"]
        try:

            def show(video: dict[str, Any]) -> None:
                nonlocal bar
                if video["step"]:
                    bar = bar or comfy.utils.ProgressBar(video["steps"])
                    with suppress(RefusedError):
                        preview = client.content(video_id, "preview")
                        bar.update_absolute(video["step"], video["steps"], _picture(preview))
                comfy.model_management.throw_exception_if_processing_interrupted()

            video = client.follow(video_id, show)
            if video["status"] == "failed":
                raise UserError(video["error"]["message"], "a video", video["error"]["code"])
            content = client.content(video_id)
        finally:
            with suppress(RefusedError):
                client.delete(video_id)
    except RefusedError as error:
        raise UserError(f"gateway {url}: {error.message}", "a video", f"the key belongs into {KEY_VARIABLE}") from None
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _picture(preview: bytes) -> tuple[str, Image.Image, int] | None:
    return ("JPEG", Image.open(io.BytesIO(preview)), PREVIEW_PIXELS) if preview else None
