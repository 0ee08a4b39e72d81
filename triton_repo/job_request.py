"""Parse a request's input tensors into the runtime's request, and check all of it before any work.

Numbers are range-checked, text is decoded strictly, images are checked by size and header. Errors are one line: found |
expected | remedy.
"""

import io
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from runtime.built_for import default_video, fill_defaults
from runtime.image import FORMATS
from runtime.image_condition import Fit
from runtime.request import CompleteRequest, Request
from runtime.video import QUALITY
from runtime.weight_sets import check_lora
from triton_repo.schema import ANY, INPUTS_BY_NAME, ONE_FRAME, VIDEO_FORMATS
from triton_repo.settings import Limits
from wan22.bundle import Manifest
from wan22.caching import Caching, Reuse, parse_steps
from wan22.errors import UserError
from wan22.residency import Video
from wan22.sampling import SolverName
from wan22.specs import ModelSpec

EXPERT_GUIDANCE = {"guidance_high_noise": "high_noise", "guidance_low_noise": "low_noise"}
PROMPTS = ("prompt", "negative_prompt", "written_prompt")
MAX_WORD_BYTES = 64  # names, such as a solver's
MAX_NAME_BYTES = 512  # of a language model and its host
WORDS = {"skip_steps": "magcache", "late_cfg": "auto"}  # in the place of a list of steps
MAX_LIST_BYTES = 1024
MAX_SEED = 2**63 - 1
MAX_FPS = 240


@dataclass(frozen=True)
class JobRequest:
    """A complete, checked job."""

    request: CompleteRequest
    fps: int
    quality: int
    output_format: str  # a key of schema.VIDEO_FORMATS
    progress_every: int
    preview: bool
    deadline_s: float  # after the job's start; infinite without a deadline


def parse_request(
    tensors: Mapping[str, np.ndarray], manifest: Manifest, limits: Limits, loras: tuple[str, ...] = ()
) -> JobRequest:
    """The job described by one request's input tensors, for the bundle of ``manifest``.

    Args:
        tensors: by the names of ``schema.INPUTS``.
        manifest: the engines' manifest.
        limits: the server's limits.
        loras: the names of its weight sets.

    Raises:
        UserError: the model does not support the request, or it exceeds a limit.
    """
    spec = manifest.spec
    for name, tensor in tensors.items():
        _check_bytes(name, tensor, limits)
    given = {name: _value(name, tensor) for name, tensor in tensors.items()}
    if "prompt" not in given:
        raise UserError("no prompt", "a description of the video", "add the input prompt")
    _check_amounts(given, default_video(manifest), limits)
    check_lora(given.get("lora"), loras)
    complete = fill_defaults(request_of(given, spec), manifest)
    _at_most("video of", complete.width * complete.height, limits.max_pixels, "pixels")
    return JobRequest(
        request=complete,
        fps=_within("fps", given.get("fps", spec.sampling.fps), 1, MAX_FPS),
        quality=_within("quality", given.get("quality", QUALITY), 1, 10),
        output_format=_format(given.get("output_format", "mp4"), complete, limits),
        progress_every=_within("progress_every", given.get("progress_every", 1), 1, limits.max_steps),
        preview=given.get("preview", False),
        deadline_s=_deadline(given),
    )


def _value(name: str, tensor: np.ndarray) -> Any:
    """The tensor as a Python value: text, number, bool, or the bytes of an image."""
    field = INPUTS_BY_NAME[name]
    if field.length == ANY:
        return tensor.tobytes() if field.dtype == "UINT8" else np.array(tensor, np.float32)
    value = tensor.flat[0]
    if field.dtype == "STRING":
        return _text(name, value)
    if field.dtype != "FP32":
        return value.item()
    if not math.isfinite(value):
        raise UserError(f"{name} {value}", "a finite number", "leave it out for the model's default")
    return float(str(np.float32(value)))  # 3.3 stays 3.3, not 3.299999952


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8", "text in UTF-8", "encode it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{name} contains a NUL", "text", "remove it")
    return text


def request_of(given: Mapping[str, Any], spec: ModelSpec) -> Request:
    """The request of ``given`` values by the names of ``schema.INPUTS``, for a model; a missing seed is drawn.

    Raises:
        UserError: a word is unknown, width or height is missing, or options of the step cache exclude each other.
    """
    guidance = dict.fromkeys(spec.experts, given["guidance"]) if "guidance" in given else {}
    guidance |= {expert: given[name] for name, expert in EXPERT_GUIDANCE.items() if name in given}
    return Request(
        given["prompt"],
        given.get("negative_prompt"),
        _size(given),
        given.get("num_frames"),
        image=given.get("image"),
        last_image=given.get("last_image"),
        fit=cast(Fit, _one_of("fit", given.get("fit", "official"), get_args(Fit))),
        seed=_within("seed", given["seed"], 0, MAX_SEED) if "seed" in given else secrets.randbelow(2**32),
        noise=np.frombuffer(noise, np.float32) if isinstance(noise := given.get("noise"), bytes) else noise,
        preset=given.get("preset"),
        boundary=given.get("boundary"),
        steps=given.get("steps"),
        shift=given.get("shift"),
        guidance=guidance,
        solver=cast(SolverName | None, given.get("solver")),
        cache=_caching(given),
        lora=given.get("lora"),
        written=given.get("written_prompt", ""),
        extended_by=given.get("extended_by", ""),
    )


def _caching(given: Mapping[str, Any]) -> Caching | None:
    """The step cache of the inputs; None without one."""
    _one_of("cache", given.get("cache", "easy"), ("easy",))
    if "cache" in given and "skip_steps" in given:
        raise UserError("cache with skip_steps", "one of them", "leave the other out")
    reuse = cast(Reuse, _one_of("reuse", given.get("reuse", "rescale"), get_args(Reuse)))
    of_easy = ("cache_threshold", "first_exact", "last_exact", "max_consecutive")
    typed = {name.removeprefix("cache_"): given[name] for name in of_easy if name in given}
    if typed and "cache" not in given:
        raise UserError(f"{', '.join(typed)} without a cache", "the input cache beside it", "add cache: easy")
    lists = {name: given[name] for name in WORDS if name in given}
    parsed: dict[str, Any] = {
        name: text if text == WORDS[name] else parse_steps(name, text) for name, text in lists.items()
    }
    caching = Caching("cache" in given, **typed, **parsed, reuse=reuse)
    if "reuse" in given and not caching.skips:
        raise UserError("reuse without skipped steps", "cache or skip_steps beside it", "add one of them")
    return caching if caching.is_on else None


def _size(given: Mapping[str, Any]) -> tuple[int, int] | None:
    if ("width" in given) != ("height" in given):
        raise UserError("width without height, or height without width", "both or neither", "give both")
    return (given["width"], given["height"]) if "width" in given else None


def _check_amounts(given: Mapping[str, Any], usual: Video, limits: Limits) -> None:
    """Check the requested size, frames and steps before opening images or allocating anything."""
    width, height = _size(given) or usual[:2]
    if min(width, height) < 1:
        raise UserError(f"size {width}x{height}", "a width and height above 0", "choose another")
    _at_most("video of", width * height, limits.max_pixels, "pixels")
    _at_most("video of", given.get("num_frames", usual[2]), limits.max_frames, "frames")
    _at_most("run of", given.get("steps", 1), limits.max_steps, "steps")


def _check_bytes(name: str, tensor: np.ndarray, limits: Limits) -> None:
    field = INPUTS_BY_NAME[name]
    if field.dtype == "STRING":
        most = MAX_LIST_BYTES if name in WORDS else MAX_WORD_BYTES
        most = MAX_NAME_BYTES if name == "extended_by" else limits.max_prompt_bytes if name in PROMPTS else most
        _at_most(f"{name} of", len(tensor.flat[0]), most, "bytes")
    elif field.dtype == "UINT8":
        _at_most(f"{name} of", tensor.nbytes, limits.max_image_bytes, "bytes")
        _check_pixels(name, tensor.tobytes(), limits)


def _check_pixels(name: str, content: bytes, limits: Limits) -> None:
    """Check an image's pixels by its header; the runtime reports files that are not images."""
    try:
        width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
    except Exception:  # Pillow raises anything on hostile headers; the runtime reports the reason
        return
    _at_most(f"{name} of", width * height, limits.max_image_pixels, "pixels")


def _at_most(what: str, found: int, most: int, unit: str) -> None:
    if found > most:
        raise UserError(f"{what} {found} {unit}", f"at most {most} on this server", "request less")


def _within(name: str, value: int, least: int, most: int) -> int:
    if least <= value <= most:
        return value
    raise UserError(f"{name} {value}", f"{least} to {most}", "choose another")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value in known:
        return value
    raise UserError(f"{name} {value!r}", f"one of {', '.join(known)}", "name one of them")


def _format(name: str, request: CompleteRequest, limits: Limits) -> str:
    _one_of("output_format", name, tuple(VIDEO_FORMATS))
    if name in ONE_FRAME and request.frames > 1:
        raise UserError(f"{request.frames} frames as {name}", "one frame", "request mp4, or 1 frame")
    if name == "frames_npz":
        raw_bytes = 3 * request.width * request.height * request.frames
        _at_most("frames of", raw_bytes, limits.max_raw_bytes, "bytes")
    return name


def _deadline(given: Mapping[str, Any]) -> float:
    """Seconds from now until the earlier deadline; a Unix time is compared with this machine's clock once."""
    left_ms = [given["deadline_ms"]] if "deadline_ms" in given else []
    if "deadline_unix_ms" in given:
        left_ms.append(given["deadline_unix_ms"] - int(time.time() * 1000))
    if min(left_ms, default=1) <= 0:
        raise UserError("a deadline in the past", "a future one", "request again with a later deadline")
    return min(left_ms, default=math.inf) / 1000
