"""What goes over the wire: one table of inputs and outputs that the configuration, the model and the client read.

Types at the edges are FP32, INT32, INT64, BOOL, STRING and UINT8 only, so that every client can speak them. All models
have the same inputs; what a model cannot do with one (an image for T2V) its runtime says. Every response carries every
output, empty where there is nothing to say, because some clients index all declared outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from runtime.request import Request

Setting = str | int | float | bool | bytes
Dtype = Literal["STRING", "UINT8", "INT32", "INT64", "FP32", "BOOL"]
NUMPY: dict[Dtype, type] = {
    "STRING": np.object_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
VIDEO_FORMATS = {"mp4": ".mp4", "webm": ".webm", "frames_npz": ".npz", "png": ".png", "jpg": ".jpg"}  # → file's ending
ONE_FRAME = ("png", "jpg")
ANY = -1  # a length that the request decides


@dataclass(frozen=True)
class Field:
    name: str
    dtype: Dtype
    length: int = 1
    of: str | Callable[[Request], Any] = ""  # the field of a request that it holds, or how to get it; empty: none


def _side(index: int) -> Callable[[Request], int | None]:
    return lambda request: request.size and request.size[index]


def _guidance(expert: str) -> Callable[[Request], float | None]:
    return lambda request: request.guidance.get(expert)


# All are optional but the prompt, which the model itself refuses to do without, so that it is counted.
INPUTS = (
    # video
    Field("prompt", "STRING", of="prompt"),
    Field("negative_prompt", "STRING", of="negative_prompt"),  # left out: the official one; empty: none
    Field("width", "INT32", of=_side(0)),
    Field("height", "INT32", of=_side(1)),
    Field("num_frames", "INT32", of="frames"),
    Field("fps", "INT32"),
    # image to video: encoded JPEG, PNG or WebP, never an address
    Field("image", "UINT8", ANY, of="image"),
    Field("last_image", "UINT8", ANY, of="last_image"),
    Field("fit", "STRING", of=lambda request: None if request.image is None else request.fit),
    # sampling
    Field("seed", "INT64", of="seed"),  # left out: drawn, and told in the first event
    Field("preset", "STRING", of="preset"),
    Field("boundary", "FP32", of="boundary"),
    Field("steps", "INT32", of="steps"),
    Field("shift", "FP32", of="shift"),
    Field("guidance", "FP32", of=lambda request: request.guidance.get("dit", request.guidance_scale)),  # of all experts
    Field("guidance_high_noise", "FP32", of=_guidance("high_noise")),
    Field("guidance_low_noise", "FP32", of=_guidance("low_noise")),
    Field("solver", "STRING", of="solver"),
    # the answer
    Field("output_format", "STRING"),  # of VIDEO_FORMATS; mp4 unless said
    Field("progress_every", "INT32"),  # steps between progress events
    Field("preview", "BOOL"),  # a JPEG with every progress event of the denoising
    Field("deadline_ms", "INT64"),  # after the job began; a wait is bounded by Triton's parameter ``timeout``
    Field("deadline_unix_ms", "INT64"),  # the same by the clocks of both machines, for clients that know nothing else
    Field("errors_as_events", "BOOL"),  # a job that fails ends with an event that has a code, not with an error
)
OUTPUTS = (
    Field("event", "STRING"),  # JSON
    Field("video", "UINT8", ANY),
    Field("preview", "UINT8", ANY),
)
INPUTS_BY_NAME = {field.name: field for field in INPUTS}
