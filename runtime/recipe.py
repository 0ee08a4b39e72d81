"""The recipe in a video's metadata: settings, seed, hash of the bundle and version, as one line of JSON.

mp4 and webm hold it as the tag "comment", PNG as text of that name. It contains no path and no time, so the same
request makes the same bytes. Images and noise are recorded by hash, so the user has to supply them again.
"""

import hashlib
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
from PIL import Image

from runtime.image_condition import Fit
from runtime.request import CompleteRequest, Request
from runtime.video import FILMS, TAG
from wan22 import version
from wan22.bundle import Manifest
from wan22.caching import Caching
from wan22.errors import DAMAGED_JSON, UserError
from wan22.inputs import check_regular
from wan22.sampling import Convention, SolverName

MAX_CHARACTERS = 2**20


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """The input of :func:`runtime.generate.generate` that makes the same frames with the same engines."""

    wan_trt: str  # version
    model: str
    bundle: str  # SHA-256 of the bundle's manifest
    prompt: str
    negative_prompt: str
    size: tuple[int, int]  # width, height as requested, before the aspect ratio of an image applies
    frames: int
    fps: int
    quality: int
    seed: int
    solver: SolverName
    schedule: Convention
    guidance: dict[str, float]  # by expert
    steps: int | None = None  # None: the preset's own list of noise levels
    shift: float | None = None
    preset: str | None = None
    boundary: float | None = None
    fit: Fit = "official"
    exact_official: bool = False
    image: str = ""  # SHA-256 of the file
    last_image: str = ""
    noise: str = ""  # SHA-256 of the float32 values
    cache: Caching | None = None  # with the lists of the steps that the run skipped
    written: str = ""  # the user's own prompt, where a language model rewrote it
    extended_by: str = ""
    lora: str = ""  # the server's name of the weights, which ``bundle`` identifies; of generate --lora the files' names

    def encoded(self) -> str:
        return msgspec.json.encode(self).decode()

    def request(self, given: Request) -> Request:
        """The request for the same video, with the images and noise of ``given``, which contains nothing else.

        Raises:
            UserError: ``given`` has other settings, or its images and noise differ from the video's.
        """
        files = {"image": given.image, "last_image": given.last_image, "noise": given.noise}
        if given != Request(image=given.image, last_image=given.last_image):
            raise UserError("--again with a prompt or settings", "only one of them", "leave the others out")
        for name, value in files.items():
            if (_digest(value) if value is not None else "") != getattr(self, name):
                expected = f"the {name} that it was made from" if getattr(self, name) else "none, as in the first run"
                remedy = f"give its --{name.replace('_', '-')}" if getattr(self, name) else "leave it out"
                found = f"another {name} than the video's" if value is not None else f"no {name}, which the video had"
                raise UserError(found, expected, remedy)
        same = ("prompt", "negative_prompt", "size", "frames", "seed", "solver", "schedule", "guidance", "steps",
                "shift", "preset", "boundary", "fit", "exact_official", "cache", "written", "extended_by")  # fmt: skip
        return Request(**{name: getattr(self, name) for name in same}, **files)  # type: ignore[arg-type]


def recipe_of(request: CompleteRequest, manifest: Manifest, fps: int, quality: int) -> Recipe:
    """The recipe of a video that the bundle of ``manifest`` makes; ``request`` holds the decisions of its cache."""
    asked, own_levels = request.asked, bool(request.sigmas)
    return Recipe(
        wan_trt=version(),
        model=manifest.spec.name,
        bundle=manifest.own_sha256,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        size=asked.size or (request.width, request.height),
        frames=request.frames,
        fps=fps,
        quality=quality,
        seed=request.seed,
        solver=request.solver,
        schedule=request.schedule,
        guidance=request.guidance,
        steps=None if own_levels else request.steps,
        shift=None if own_levels else request.shift,
        preset=asked.preset,
        boundary=request.boundary,
        fit=request.fit,
        exact_official=asked.exact_official,
        image="" if asked.image is None else _digest(asked.image),
        last_image="" if asked.last_image is None else _digest(asked.last_image),
        noise="" if asked.noise is None else _digest(asked.noise),
        cache=request.cache,
        written=asked.written,
        extended_by=asked.extended_by,
        lora=request.lora or "",
    )


def _digest(content: "Path | bytes | np.ndarray") -> str:
    if isinstance(content, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(content, np.float32).tobytes()).hexdigest()
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a video or a PNG.

    Raises:
        UserError: there is no such file, or wan-trt did not write it.
    """
    check_regular(path)
    try:
        text = _tag(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", "a video made by wan-trt", "name another") from None
    except (av.FFmpegError, SyntaxError, ValueError):
        raise UserError(f"{path} cannot be read", "an .mp4, .webm or .png made by wan-trt", "name another") from None
    try:
        return msgspec.json.decode(text[:MAX_CHARACTERS], type=Recipe)
    except DAMAGED_JSON:
        expected = "settings written by wan-trt into an .mp4, .webm or .png"
        raise UserError(f"{path} has no settings in its metadata", expected, "name the original file") from None


def _tag(path: Path) -> str:
    if path.suffix.lower() in FILMS:
        path.open("rb").close()  # raises the reason, which FFmpeg hides
        with av.open(str(path)) as container:
            tags: dict[str, Any] = {key.lower(): value for key, value in container.metadata.items()}
    else:
        with Image.open(path, formats=("PNG",)) as image:
            tags = {str(key).lower(): value for key, value in image.info.items()}
    return str(tags.get(TAG, ""))
