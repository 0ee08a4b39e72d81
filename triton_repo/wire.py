"""A request → input tensors of the served model, as ``schema.INPUTS`` has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.request import Request
from triton_repo.schema import INPUTS_BY_NAME, NUMPY
from wan22.errors import UserError

Setting = str | int | float | bool | bytes
WIRE_NAMES = {"STRING": "BYTES"}  # the protocol has its own word
# input by expert; a model with one expert has one guidance
GUIDANCE = {"high_noise": "guidance_high_noise", "low_noise": "guidance_low_noise", "dit": "guidance"}


def inputs_of(request: Request) -> dict[str, Setting | None]:
    """The inputs that describe ``request``; what it leaves to the model stays None.

    Raises:
        UserError: an image that cannot be read, or what the wire has no input for.
    """
    if request.exact_official or request.schedule is not None:
        raise UserError("exact_official or another schedule in a served job", "neither", "generate without a server")
    if unknown := set(request.guidance) - set(GUIDANCE):
        raise UserError(f"guidance for {min(unknown)!r}", f"one of {', '.join(GUIDANCE)}", "name an expert")
    width, height = request.size or (None, None)
    guidance = {GUIDANCE[expert]: value for expert, value in request.guidance.items()}
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": request.frames,
        "image": content_of(request.image),
        "last_image": content_of(request.last_image),
        "fit": request.fit if request.image is not None else None,
        "seed": request.seed,
        "preset": request.preset,
        "boundary": request.boundary,
        "steps": request.steps,
        "shift": request.shift,
        "solver": request.solver,
        "guidance": request.guidance_scale,
        **guidance,
    }


def content_of(image: bytes | Path | None) -> bytes | None:
    if not isinstance(image, Path):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise UserError(f"{image}: {error.strerror}", "a readable image", "name an image file") from None


def input_tensors(settings: Mapping[str, Setting | None]) -> list[Any]:
    """Tensors for Triton's client of every setting that is not None.

    Raises:
        UserError: a setting that no model has, or a value that its type cannot hold.
    """
    from tritonclient import grpc

    tensors = []
    for name, value in settings.items():
        if name not in INPUTS_BY_NAME:
            raise UserError(f"setting {name!r}", f"one of {', '.join(INPUTS_BY_NAME)}", "name one of them")
        if value is not None:
            array = _array(name, value)
            dtype = INPUTS_BY_NAME[name].dtype
            tensor = grpc.InferInput(name, list(array.shape), WIRE_NAMES.get(dtype, dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
    return tensors


def _array(name: str, value: Setting) -> np.ndarray:
    dtype = INPUTS_BY_NAME[name].dtype
    if dtype == "UINT8":
        return np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value, np.uint8)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    try:
        return np.array([value], NUMPY[dtype])
    except (OverflowError, ValueError, TypeError):
        raise UserError(f"{name} {value!r}", f"a number that fits {dtype}", "choose another") from None
