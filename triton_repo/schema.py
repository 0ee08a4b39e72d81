"""What goes over the wire: one table of inputs and outputs that the configuration, the model and the client read.

Types at the edges are FP32, INT32, INT64, BOOL, STRING and UINT8 only, so that every client can speak them. All models
have the same inputs; what a model cannot do with one (an image for T2V) its runtime says. Every response carries every
output, empty where there is nothing to say, because some clients index all declared outputs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

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


INPUTS = (
    # video
    Field("prompt", "STRING"),  # the only one that must be given; the model refuses requests without it
    Field("negative_prompt", "STRING"),  # left out: the official one; empty: none
    Field("width", "INT32"),
    Field("height", "INT32"),
    Field("num_frames", "INT32"),
    Field("fps", "INT32"),
    # image to video: encoded JPEG, PNG or WebP, never an address
    Field("image", "UINT8", ANY),
    Field("last_image", "UINT8", ANY),
    Field("fit", "STRING"),
    # sampling
    Field("seed", "INT64"),  # left out: drawn, and told in the first event
    Field("preset", "STRING"),
    Field("boundary", "FP32"),
    Field("steps", "INT32"),
    Field("shift", "FP32"),
    Field("guidance", "FP32"),  # of every expert
    Field("guidance_high_noise", "FP32"),
    Field("guidance_low_noise", "FP32"),
    Field("solver", "STRING"),
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
