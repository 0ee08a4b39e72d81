"""The nodes of engines, latents, images and the VAE. torch is used for ComfyUI's tensors alone."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

from runtime.block_backend import BlockOptions
from runtime.pipeline import Pipeline
from runtime.request import Request
from wan22.bundle import MANIFEST, read_manifest
from wan22.errors import UserError
from wan22.quantities import parse_bytes
from wan22.specs import ModelSpec
from wan_trt.diffusers.values import frames_of

from .latents import exact, latent_of, png
from .remote import RemoteSampler
from .sampling import CATEGORY, Lora, Sampler

FOLDER = "wan_trt"  # of ComfyUI's models

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def bundles() -> dict[str, Path]:
    """Engine bundles in ComfyUI's model folders, by name."""
    places = [Path(place) for place in folder_paths.get_folder_paths(FOLDER)]
    return {path.parent.name: path.parent for place in places for path in sorted(place.glob(f"*/{MANIFEST}"))}


@dataclass
class _Open:
    """The pipeline that is open in this process: engines of two bundles at once are too much for most cards."""

    key: tuple[str, ...] = ()
    pipeline: Pipeline | None = None


_open = _Open()


class Engines:
    """A bundle of engines in ``models/wan_trt``. Another one takes the place of the last."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "open", ("WAN_TRT_ENGINES",), ("engines",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"bundle": (sorted(bundles()) or ["none"],)},
            "optional": {
                "residency": (["auto", "all", "one-expert", "one-component"],),
                "weights_in": (["auto", "vram", "host", "disk"],),
                "vram": ("STRING", {"default": "", "tooltip": "Memory for a transformer in blocks, as 8GiB."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **_: Any) -> str:  # noqa: N802
        """The bundle's hash: one that was built again is opened again."""
        place = bundles().get(bundle)
        return "" if place is None else read_manifest(place, "engines").own_sha256

    def open(self, bundle: str, residency: str = "auto", weights_in: str = "auto", vram: str = "") -> tuple[Pipeline]:
        place = bundles().get(bundle)
        if place is None:
            raise UserError(f"engines {bundle!r}", f"a bundle in ComfyUI's models/{FOLDER}", "copy or link it there")
        key = (str(place), self.IS_CHANGED(bundle), residency, weights_in, vram)
        if key != _open.key:
            if _open.pipeline is not None:
                _open.pipeline.__exit__()
            _open.key, _open.pipeline = (), None
            blocks = BlockOptions(weights_in, parse_bytes(vram, "vram") if vram else None)
            _open.pipeline, _open.key = Pipeline.open(place, residency=residency, blocks=blocks), key
        assert _open.pipeline is not None
        return (_open.pipeline,)


class EmptyLatent:
    """Latents for a video that the engines make; 0 stands for the bundle's default."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        side = {"default": 0, "min": 0, "max": 8192, "step": 16}
        return {
            "required": {
                "engines": ("WAN_TRT_ENGINES",),
                "width": ("INT", side),
                "height": ("INT", side),
                "frames": ("INT", {"default": 0, "min": 0, "max": 1001, "step": 1}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def make(
        self, engines: Pipeline, width: int, height: int, frames: int, batch_size: int = 1
    ) -> tuple[dict[str, Any]]:
        size = (width, height) if width and height else None
        shape = engines.complete(_placeholder(engines.spec, size, frames or None)).latent_shape
        return ({"samples": torch.zeros((batch_size, *shape[1:]))},)


def _placeholder(spec: ModelSpec, size: tuple[int, int] | None, frames: int | None) -> Request:
    """A request that only asks for the shape of its latents."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    image = picture.getvalue() if spec.takes.image == "required" else None
    return Request("-", size=size, frames=frames, image=image, fit="crop")


class ImageToVideo:
    """An image to start from, and with I2V one to end with: a condition for the sampler, and latents of its size."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES, RETURN_NAMES = ("WAN_TRT_CONDITION", "LATENT"), ("condition", "latent")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        shape = EmptyLatent.INPUT_TYPES()["required"]
        return {"required": {**shape, "image": ("IMAGE",)}, "optional": {"last_image": ("IMAGE",)}}

    def make(
        self,
        engines: Pipeline,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        image: Any,
        last_image: Any = None,
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        given = {"image": image, "last_image": last_image}
        images = {name: png(pixels) for name, pixels in given.items() if pixels is not None}
        size = (width, height) if width and height else None
        request = engines.complete(Request("-", size=size, frames=frames or None, fit="crop", **images))
        return images, {"samples": torch.zeros((batch_size, *request.latent_shape[1:]))}


class Decode:
    """Latents to images."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "decode", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"engines": ("WAN_TRT_ENGINES",), "latent": ("LATENT",)}}

    def decode(self, engines: Pipeline, latent: dict[str, Any]) -> tuple[Any]:
        latents = exact(latent, engines.spec)
        bar = comfy.utils.ProgressBar(latents.shape[0] * latents.shape[2])

        def counted(one: np.ndarray) -> Iterator[np.ndarray]:
            for chunk in engines.decode(one):
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update(1)
                yield chunk

        videos = [frames_of(counted(np.ascontiguousarray(one[None], np.float32))) for one in latents]
        return (torch.from_numpy(np.concatenate(videos)),)


class Encode:
    """Images, a multiple of 4 plus 1, to latents."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"engines": ("WAN_TRT_ENGINES",), "image": ("IMAGE",)}}

    def encode(self, engines: Pipeline, image: Any) -> tuple[dict[str, Any]]:
        names = {component.name for component in engines.bundle.manifest.components}
        if ("vae_encoder_next" if len(image) > 1 else "vae_encoder_first") not in names:
            found = f"{len(image)} images for the encoder of {engines.spec.name}"
            raise UserError(found, "engines of I2V, or one image for TI2V", "use others")
        pixels = image[..., :3].detach().cpu().float().numpy()
        height, width = pixels.shape[1:3]
        engines.spec.latent_shape(width, height, len(pixels))
        video = np.ascontiguousarray(2 * pixels.transpose(3, 0, 1, 2)[None] - 1, np.float32)
        latents = engines.encode(video)
        return (latent_of(latents, engines.spec),)


NODES: dict[str, tuple[type, str]] = {
    "WanTrtEngines": (Engines, "Wan TRT Engines"),
    "WanTrtEmptyLatent": (EmptyLatent, "Wan TRT Empty Latent"),
    "WanTrtImageToVideo": (ImageToVideo, "Wan TRT Image to Video"),
    "WanTrtLora": (Lora, "Wan TRT LoRA"),
    "WanTrtSampler": (Sampler, "Wan TRT Sampler"),
    "WanTrtDecode": (Decode, "Wan TRT VAE Decode"),
    "WanTrtEncode": (Encode, "Wan TRT VAE Encode"),
    "WanTrtRemoteSampler": (RemoteSampler, "Wan TRT Remote Sampler"),
}
