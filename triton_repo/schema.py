"""The wire format: one table of inputs and outputs for the configuration, the model and the client.

Only FP32, INT32, INT64, BOOL, STRING and UINT8 are used, which every client supports. All models have the same inputs;
the runtime refuses those that a model does not support (an image for T2V). Every response contains every output, even
if empty, because some clients index all declared outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from runtime.request import Request
from wan22.caching import Caching
from wan22.looks import with_terms

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
VIDEO_FORMATS = {"mp4": ".mp4", "webm": ".webm", "frames_npz": ".npz", "png": ".png", "jpg": ".jpg"}  # → file suffix
ONE_FRAME = ("png", "jpg")
ANY = -1  # a length set by the request


@dataclass(frozen=True)
class Field:
    name: str
    dtype: Dtype
    length: int = 1
    of: str | Callable[[Request], Any] = ""  # field or function of a request; empty if it has none


def _prompt(request: Request) -> str | None:
    """The prompt behind its looks, which the server does not know by name."""
    return request.prompt and with_terms(request.prompt, request.terms, image=request.image is not None)


def _noise(request: Request) -> bytes | None:
    return None if request.noise is None else np.ascontiguousarray(request.noise, np.float32).tobytes()


def _side(index: int) -> Callable[[Request], int | None]:
    return lambda request: request.size and request.size[index]


def _guidance(expert: str) -> Callable[[Request], float | None]:
    return lambda request: request.guidance.get(expert)


def _cache(request: Request) -> Caching:
    """The step cache to send. A list goes before easy, so a recorded run is its list alone; an empty one is nothing."""
    cache = request.cache or Caching()
    return cache if cache.skip_steps is None else replace(cache, easy=False, skip_steps=cache.skip_steps or None)


def _of_easy(name: str) -> Callable[[Request], Any]:
    return lambda request: getattr(cache, name) if (cache := _cache(request)).easy else None


def _steps(name: str) -> Callable[[Request], str | None]:
    def text(request: Request) -> str | None:
        steps = getattr(_cache(request), name)
        return ",".join(map(str, steps)) or None if isinstance(steps, tuple) else steps

    return text


CACHE_INPUTS = (  # see :class:`wan22.caching.Caching`
    Field("cache", "STRING", of=lambda request: "easy" if _cache(request).easy else None),
    Field("cache_threshold", "FP32", of=_of_easy("threshold")),
    Field("first_exact", "INT32", of=_of_easy("first_exact")),
    Field("last_exact", "INT32", of=_of_easy("last_exact")),
    Field("max_consecutive", "INT32", of=_of_easy("max_consecutive")),
    Field("skip_steps", "STRING", of=_steps("skip_steps")),  # 11,12,14 or magcache
    Field("reuse", "STRING", of=lambda request: cache.reuse if (cache := _cache(request)).skips else None),
    Field("late_cfg", "STRING", of=_steps("late_cfg")),  # 24,26,28 or auto
)
# The prompt is required, but Triton treats all as optional: the model refuses a missing one, so that it is counted.
INPUTS = (
    # video
    Field("prompt", "STRING", of=_prompt),
    Field("negative_prompt", "STRING", of="negative_prompt"),  # missing means the official one, empty means none
    Field("width", "INT32", of=_side(0)),
    Field("height", "INT32", of=_side(1)),
    Field("num_frames", "INT32", of="frames"),
    Field("fps", "INT32"),
    Field("quality", "INT32"),  # of mp4 and webm, 1 to 10; 8 is the official setting
    # image to video: encoded JPEG, PNG or WebP, not a URL
    Field("image", "UINT8", ANY, of="image"),
    Field("last_image", "UINT8", ANY, of="last_image"),
    Field("fit", "STRING", of=lambda request: None if request.image is None else request.fit),
    # sampling
    Field("seed", "INT64", of="seed"),  # missing means a random one, reported in the first event
    Field("noise", "FP32", ANY, of=_noise),  # the initial latents, flat, in place of the seed's
    Field("preset", "STRING", of="preset"),
    Field("boundary", "FP32", of="boundary"),
    Field("steps", "INT32", of="steps"),
    Field("shift", "FP32", of="shift"),
    Field("guidance", "FP32", of=lambda request: request.guidance.get("dit", request.guidance_scale)),  # for all
    Field("guidance_high_noise", "FP32", of=_guidance("high_noise")),
    Field("guidance_low_noise", "FP32", of=_guidance("low_noise")),
    Field("solver", "STRING", of="solver"),
    Field("lora", "STRING", of="lora"),  # a name of ``wan-trt serve --lora``
    *CACHE_INPUTS,
    # for the metadata of a video whose prompt was rewritten before it came here
    Field("written_prompt", "STRING", of=lambda request: request.written or None),  # the user's own
    Field("extended_by", "STRING", of=lambda request: request.extended_by or None),  # the language model
    # the answer
    Field("output_format", "STRING"),  # a key of VIDEO_FORMATS; default mp4
    Field("progress_every", "INT32"),  # steps between progress events
    Field("preview", "BOOL"),  # a JPEG with every progress event of the denoising
    Field("deadline_ms", "INT64"),  # after the job's start; Triton's parameter ``timeout`` limits the wait
    Field("deadline_unix_ms", "INT64"),  # the same in Unix time; needs synchronised clocks
    Field("errors_as_events", "BOOL"),  # report failures as events with a code instead of errors
)
OUTPUTS = (
    Field("event", "STRING"),  # JSON
    Field("video", "UINT8", ANY),
    Field("preview", "UINT8", ANY),
)
INPUTS_BY_NAME = {field.name: field for field in INPUTS}
