"""One table of what a request may contain: it feeds the parser, its error messages and ``/openapi.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from wan22.looks import GROUPS, LOOKS

Kind = Literal["text", "int", "number", "bool", "size", "image", "list", "names"]
LONGEST_GUESS = 40  # characters of a name that may be one of ours, misspelt
JSON_TYPES = {"text": "string", "int": "integer", "number": "number", "bool": "boolean", "size": "string"}


@dataclass(frozen=True)
class Field:
    name: str  # as it is echoed
    kind: Kind
    says: str
    aliases: tuple[str, ...] = ()
    sent_as: str = ""  # the input of the served model, if it is passed on as it is
    echoed: bool = True  # the video object states the effective value


FIELDS = (
    Field("prompt", "text", "Description of the video, 1 to 32000 characters.", sent_as="prompt"),
    Field("look", "names", "Looks and cinematic terms to put in front of the prompt.", ("looks",), echoed=False),
    Field("prompt_extend", "bool", "Let the operator's language model rewrite the prompt.", echoed=False),
    Field("model", "text", "A model of /v1/models; by default the only one."),
    Field("n", "int", "Number of videos; only 1.", ("num_outputs_per_prompt",), echoed=False),
    Field("user", "text", "Accepted and not used.", echoed=False),
    # video
    Field("seconds", "number", "Length; seconds times fps, rounded to the model's number of frames."),
    Field("size", "size", "WIDTHxHEIGHT in pixels."),
    Field("width", "int", "Pixels, with height in place of size.", echoed=False),
    Field("height", "int", "Pixels, with width in place of size.", echoed=False),
    Field("num_frames", "int", "A multiple of 4, plus 1; goes before seconds.", ("frames",)),
    Field("fps", "int", "Frames per second of the file.", ("frame_rate",)),
    Field("quality", "int", "Quality of the file, 1 to 10.", sent_as="quality"),
    Field("output_format", "text", "mp4 (also: auto) or webm."),
    # images
    Field("input_reference", "image", "Image to start from: a file, or {image_url}.", ("image_reference", "image")),
    Field("last_image", "image", "Image to end with, likewise.", ("last_frame",)),
    Field("fit", "text", "official: keep the image's aspect ratio; crop: exactly the size.", sent_as="fit"),
    # sampling
    Field("negative_prompt", "text", "What not to show; by default the official one.", sent_as="negative_prompt"),
    Field("seed", "int", "By default drawn at random.", sent_as="seed"),
    Field("latent", "text", "Name of initial latents of the operator, in place of the seed's.", ("latent_path",)),
    Field("preset", "text", "Named settings of the model.", sent_as="preset"),
    Field("num_inference_steps", "int", "Denoising steps.", ("steps", "infer_steps"), sent_as="steps"),
    Field("flow_shift", "number", "Shift of the noise schedule.", ("shift",), sent_as="shift"),
    Field("solver", "text", "unipc, dpm++, euler or renoise.", sent_as="solver"),
    Field("boundary", "number", "Share of the timesteps of the high-noise expert.", ("boundary_ratio",), "boundary"),
    Field("guidance_high_noise", "number", "Guidance of the high-noise expert.", sent_as="guidance_high_noise"),
    Field("guidance_low_noise", "number", "Guidance of the low-noise expert.", sent_as="guidance_low_noise"),
    Field("guidance_scale", "number", "Guidance of all experts; with guidance_scale_2 of high noise.", ("guidance",)),
    Field("guidance_scale_2", "number", "Guidance of the low-noise expert, as in diffusers.", echoed=False),
    Field("lora", "text", "Name of a LoRA of the server.", sent_as="lora"),
    # step cache
    Field("cache", "text", "easy: skip steps that change little.", sent_as="cache"),
    Field("cache_threshold", "number", "Change up to which easy skips.", sent_as="cache_threshold"),
    Field("first_exact", "int", "Steps that easy computes at the start.", sent_as="first_exact"),
    Field("last_exact", "int", "Steps that easy computes at the end.", sent_as="last_exact"),
    Field("max_consecutive", "int", "Steps that easy skips in a row.", sent_as="max_consecutive"),
    Field("skip_steps", "list", "Steps to skip, from 0: 11,12,14 or magcache.", sent_as="skip_steps"),
    Field("reuse", "text", "Velocity of a skipped step: rescale, hold or taylor1.", sent_as="reuse"),
    Field("late_cfg", "list", "Steps with extrapolated guidance: 24,26 or auto.", sent_as="late_cfg"),
    # the job
    Field("priority", "int", "1 goes before 2."),
    Field("timeout_seconds", "number", "Longest run of the job, counted from its start."),
    Field("preview", "bool", "Make a preview image with every step."),
    Field("task_id", "text", "The same as the header Idempotency-Key.", echoed=False),
)
TERMS = [term for group in GROUPS.values() for term in group.terms]
MERGED = ("extra_body", "extra_params")  # objects whose members count as members of the request
BY_NAME: Mapping[str, Field] = {name: each for each in FIELDS for name in (each.name, *each.aliases)}


def nearest(name: str) -> str | None:
    """The known name that is most like ``name``; None if none is."""
    if len(name) > LONGEST_GUESS:  # comparing takes the square of its length
        return None
    close = get_close_matches(name.lower(), BY_NAME, n=1, cutoff=0.6)
    return close[0] if close else None


def schema() -> dict[str, object]:
    """The request body as a JSON schema."""
    image: dict[str, object] = {
        "type": "object",
        "properties": {"image_url": {"type": "string"}},
        "required": ["image_url"],
    }
    listed: dict[str, object] = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}
    names: dict[str, object] = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"enum": [*LOOKS, *TERMS]}}]}
    special = {"image": image, "list": listed, "names": names}
    properties = {
        name: {**(special.get(each.kind) or {"type": JSON_TYPES[each.kind]}), "description": each.says}
        for name, each in BY_NAME.items()
    }
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}
