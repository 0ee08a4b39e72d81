"""A request's values → an order: the inputs of the served model, and the effective values that the client is told.

The served model's own checks run here, on the description that its server gives, before anything is written or queued.
"""

import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.api_error import ApiError, invalid
from gateway.fields import FIELDS
from gateway.images import image_content
from gateway.served import ServedModel
from runtime.built_for import default_video
from triton_repo.failure import Failure
from triton_repo.job_request import JobRequest, parse_request
from triton_repo.schema import Setting
from triton_repo.wire import arrays_of
from wan22.errors import UserError
from wan22.looks import with_terms
from wan22.shapes import parse_size

MAX_PROMPT = 32_000  # characters
MAX_SEED = 2**63 - 1
IMAGES = {"input_reference": "image", "last_image": "last_image"}  # → input of the served model
FORMATS = {"mp4": "video/mp4", "webm": "video/webm"}
PRIORITIES = (1, 2)
EXTENSION = ("written_prompt", "extended_by", "extend_warning")  # set by :mod:`gateway.extension`
# a word of the model's error → the field that it is about; the first that occurs, if possible of the client's fields
ABOUT = {
    "noise of": "latent", "seed": "seed",
    "last image": "last_image", "last_image": "last_image", "image": "input_reference",
    "fps": "fps", "quality": "quality", "solver": "solver", "lora": "lora", "preset": "preset", "boundary": "boundary",
    "guidance": "guidance_scale", "late": "late_cfg", "skip": "skip_steps", "cache": "cache", "exact": "first_exact",
    "consecutive": "max_consecutive", "reuse": "reuse", "shift": "flow_shift", "step": "num_inference_steps",
    "fit '": "fit", "negative_prompt": "negative_prompt", "prompt": "prompt", "pixels": "size", "size": "size",
    "frames": "num_frames",
}  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What is stored of a request: everything that its job needs."""

    model: str
    inputs: dict[str, Setting]  # of the served model, without images and latents
    images: dict[str, bytes]  # by input
    echo: dict[str, Any]  # effective values by field
    priority: int
    timeout_s: float | None

    @property
    def media_type(self) -> str:
        return FORMATS[str(self.inputs["output_format"])]

    @property
    def work(self) -> float:
        """Pixels times frames times steps: what a job's time is roughly proportional to."""
        width, height = map(int, str(self.echo["size"]).split("x"))
        return float(width * height * self.echo["num_frames"] * self.echo["num_inference_steps"])


@dataclass(frozen=True)
class Latents:
    """Initial latents that the operator offers: float32 values by name, and the files that they came from."""

    values: Mapping[str, bytes] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    def name_of(self, asked: str) -> str:
        """The name of the latents that a request means by their name or their file, which is not opened.

        Raises:
            ApiError: there are none.
        """
        for name, path in self.files.items():
            if asked in (name, str(path), str(path.absolute())):
                return name
        known = f"one of {', '.join(self.files)}" if self.files else "none: the operator offers no latents"
        raise invalid("latent", f"latent {asked[:80]!r} | expected {known}; files of clients are not opened")


def make_order(
    values: Mapping[str, Any], model: ServedModel, hosts: Collection[str] = (), latents: Latents | None = None
) -> Order:
    """The order for canonical ``values``; images are fetched and decoded, so this takes a while.

    ``written_prompt``, ``extended_by`` and ``extend_warning`` of :mod:`gateway.extension` are stored and told as well.

    Raises:
        ApiError: the model does not support the request, or it is beyond a limit.
    """
    _check_text(values)
    if values.get("n", 1) != 1:
        raise invalid("n", f"n {values['n']} | expected 1 | send a request for each video", "unsupported_value")
    images = {IMAGES[name]: image_content(name, values[name], hosts) for name in IMAGES if name in values}
    values = {**values, "prompt": _with_looks(values)}
    inputs, own_noise = _inputs(values, model), {}
    if "latent" in values:
        latents = latents or Latents()
        values = {**values, "latent": latents.name_of(values["latent"])}
        own_noise = {"noise": latents.values[values["latent"]]}
    asked = _checked({**inputs, **images, **own_noise}, model, values.keys())
    priority = values.get("priority", 2)
    if priority not in PRIORITIES:
        raise invalid("priority", f"priority {priority} | expected 1, which goes first, or 2")
    timeout_s = values.get("timeout_seconds")
    if timeout_s is not None and timeout_s <= 0:
        raise invalid("timeout_seconds", f"timeout_seconds {timeout_s:g} | expected more than 0")
    return Order(model.id, inputs, images, _echo(values, asked, model, priority), priority, timeout_s)


def _check_text(values: Mapping[str, Any]) -> None:
    if not values.get("prompt", "").strip():
        raise invalid("prompt", "no prompt | expected a description of the video", "missing_required_field")
    for name in ("prompt", "negative_prompt"):
        if len(values.get(name, "")) > MAX_PROMPT:
            raise invalid(name, f"{name} of {len(values[name])} characters | expected at most {MAX_PROMPT}")


def _with_looks(values: Mapping[str, Any]) -> str:
    """The prompt behind the terms of the looks. The client is told this one, which makes the same video again."""
    try:
        prompt = with_terms(values["prompt"], values.get("look", ()), image=bool(IMAGES.keys() & values.keys()))
    except UserError as error:
        raise ApiError(400, "invalid_value", f"{error.found} | expected {error.expected}", "look") from None
    if len(prompt) > MAX_PROMPT:
        raise invalid("look", f"prompt and look of {len(prompt)} characters | expected at most {MAX_PROMPT}")
    return prompt


def _inputs(values: Mapping[str, Any], model: ServedModel) -> dict[str, Setting]:
    inputs: dict[str, Setting] = {
        each.sent_as: values[each.name] for each in FIELDS if each.sent_as and each.name in values
    }
    inputs |= {name: values[name] for name in ("written_prompt", "extended_by") if name in values}
    inputs |= _size(values) | _guidance(values, model) | _length(values, model)
    inputs.setdefault("seed", secrets.randbelow(2**32))
    if not 0 <= int(inputs["seed"]) <= MAX_SEED:
        raise invalid("seed", f"seed {int(inputs['seed'])} | expected 0 to {MAX_SEED}")
    wanted = values.get("output_format", "mp4")
    inputs["output_format"] = "mp4" if wanted == "auto" else wanted
    if inputs["output_format"] not in FORMATS:
        raise invalid("output_format", f"output_format {wanted[:40]!r} | expected one of {', '.join(FORMATS)}")
    inputs["preview"] = values.get("preview", False)
    return inputs


def _size(values: Mapping[str, Any]) -> dict[str, Setting]:
    sides = {name: values[name] for name in ("width", "height") if name in values}
    if "size" not in values:
        if len(sides) == 1:
            raise invalid(next(iter(sides)), "width without height, or height without width | expected both")
        return dict(sides)
    if sides:
        raise invalid("size", "size given with width or height | expected one of the two", "duplicate_field")
    try:
        width, height = parse_size(values["size"])
    except UserError:
        raise invalid("size", f"size {values['size'][:40]!r} | expected WIDTHxHEIGHT, such as 832x480") from None
    return {"width": width, "height": height}


def _guidance(values: Mapping[str, Any], model: ServedModel) -> dict[str, Setting]:
    """Native names as they are; ``guidance_scale`` with ``guidance_scale_2`` is (high noise, low noise)."""
    native = [name for name in ("guidance_high_noise", "guidance_low_noise") if name in values]
    pair = [name for name in ("guidance_scale", "guidance_scale_2") if name in values]
    if native and pair:
        raise invalid(
            pair[0], f"{pair[0]} with {native[0]} | expected one way to name the experts", "conflicting_fields"
        )
    if "guidance_scale_2" in values:
        if "guidance_scale" not in values:
            raise invalid("guidance_scale_2", "guidance_scale_2 alone | expected guidance_scale beside it")
        if "high_noise" not in model.manifest.spec.experts:
            raise invalid("guidance_scale_2", f"guidance_scale_2 for {model.id} | expected a model with two experts")
        return {"guidance_high_noise": values["guidance_scale"], "guidance_low_noise": values["guidance_scale_2"]}
    return {"guidance": values["guidance_scale"]} if pair else {}


def _length(values: Mapping[str, Any], model: ServedModel) -> dict[str, Setting]:
    """Frames and frames per second; ``seconds`` becomes the nearest number of frames that the model makes."""
    spec = model.manifest.spec
    fps = values.get("fps", spec.sampling.fps)
    length: dict[str, Setting] = {name: values[name] for name in ("fps", "num_frames") if name in values}
    if (seconds := values.get("seconds")) is None:
        return length
    if not 0 < seconds <= 3600:
        raise invalid("seconds", f"seconds {seconds:g} | expected more than 0, at most 3600")
    stride = spec.vae.temporal_stride
    frames = stride * math.floor(seconds * fps / stride + 0.5) + 1
    if values.get("num_frames", frames) != frames:
        found = f"num_frames {values['num_frames']} with seconds {seconds:g} at {fps} fps"
        raise invalid("num_frames", f"{found} | expected {frames}, or one of the two alone", "conflicting_fields")
    return {**length, "num_frames": frames}


def _checked(inputs: Mapping[str, Setting], model: ServedModel, given: Collection[str]) -> JobRequest:
    """The complete request, as the served model will see it; ``given`` holds the fields of the client."""
    try:
        return parse_request(arrays_of(inputs), model.manifest, model.limits, model.loras)
    except UserError as error:
        failure = Failure.of(error)
        text = f"{error.found} {error.expected}".lower()
        names = [name for word, name in ABOUT.items() if word in text]
        param = next((name for name in names if name in given), names[0] if names else None)
        raise ApiError(400, "invalid_value", _with_known_sizes(failure.message, param, model), param) from None


def _with_known_sizes(message: str, param: str | None, model: ServedModel) -> str:
    if param != "size":
        return message
    width, height, frames = default_video(model.manifest)
    return f"{message} | {model.id} makes {width}x{height} with {frames} frames unless asked otherwise"


def _echo(values: Mapping[str, Any], asked: JobRequest, model: ServedModel, priority: int) -> dict[str, Any]:
    """The effective value of every field, so that the same request can be made again."""
    request, fps = asked.request, asked.fps
    seconds = values.get("seconds", (request.frames - 1) / fps)
    boundary = request.boundary if request.boundary is not None else model.manifest.spec.sampling.boundary
    scales = set(request.guidance.values())
    by_expert = {f"guidance_{name}": scale for name, scale in request.guidance.items() if name != "dit"}
    echo = {
        "prompt": request.prompt,
        "model": model.id,
        "seconds": f"{seconds:g}",
        "size": f"{request.width}x{request.height}",
        "num_frames": request.frames,
        "fps": fps,
        "quality": asked.quality,
        "output_format": asked.output_format,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "preset": values.get("preset", model.manifest.spec.sampling.preset),
        "num_inference_steps": request.steps,
        "flow_shift": request.shift,
        "solver": request.solver,
        "boundary": boundary if request.switch_step is None else None,  # the preset switches at a step
        "guidance_scale": scales.pop() if len(scales) == 1 else None,
        **by_expert,
        "lora": request.lora,
        "priority": priority,
        "preview": asked.preview,
    }
    passed = ("cache", "cache_threshold", "first_exact", "last_exact", "max_consecutive", "skip_steps", "reuse",
              "late_cfg", "fit", "timeout_seconds", "latent", *EXTENSION)  # fmt: skip
    return echo | {name: values[name] for name in passed if name in values}
