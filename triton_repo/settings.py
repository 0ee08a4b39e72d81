"""What a served model is told beside its requests: where its engines are, and what no request may exceed.

Written into ``config.pbtxt`` as string parameters and read back by the model.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import msgspec

from wan22.bundle import MANIFEST, Bundle, sha256_of
from wan22.errors import UserError
from wan22.residency import ResidencyChoice
from wan22.specs import ModelSpec

MEBIBYTE = 2**20
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class Limits:
    """Checked before any work on a request is done."""

    max_pixels: int  # width times height of the video
    max_frames: int
    max_steps: int = 100
    max_prompt_bytes: int = 16 * 1024  # of each prompt; 512 tokens are far less
    max_image_bytes: int = 32 * MEBIBYTE
    max_image_pixels: int = 33_000_000  # judged by the header, before a pixel is decoded
    max_raw_bytes: int = (
        128 * MEBIBYTE
    )  # of frames_npz; holds 81 frames of 832x480. A server is slow with large answers
    max_queue_size: int = 8  # waiting jobs per priority; more are refused at once
    queue_timeout_s: int = 3600  # a job that waited this long is refused
    longest_job_s: int = 3600  # a job that runs this long is given up; also what a shutdown waits for

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} {value}", "at least 1", "raise it")

    @classmethod
    def of(cls, spec: ModelSpec, **changed: int | None) -> "Limits":
        """The largest official size and length of ``spec``, but for what is ``changed`` (None: not)."""
        pixels = max(width * height for width, height in spec.sampling.sizes)
        given = {name: value for name, value in changed.items() if value is not None}
        return cls(**{"max_pixels": pixels, "max_frames": spec.sampling.frames, **given})


@dataclass(frozen=True)
class Settings:
    """The parameters of one served model."""

    engines: str  # folder of the engine bundle on the serving machine
    bundle_sha256: str  # of its bundle.json
    model: str  # name of the spec
    limits: Limits
    residency: ResidencyChoice = "auto"  # what stays loaded between jobs, see :class:`runtime.pipeline.Pipeline`
    warm_up: bool = True  # one smallest job before the model is ready
    full_check: bool = True  # hash every file at load, not only those under 1 GiB
    drain_flag: str = ""  # while this file exists the model says that it is not ready
    # BLS only
    components: str = ""  # the models that hold the engines have this name, an underscore, and the component's
    component: str = ""  # the one component that this model holds

    def parameters(self) -> dict[str, str]:
        """Name and text of each value, limits beside the rest, as a Triton configuration holds them."""
        flat = {**asdict(self), **asdict(self.limits)}
        del flat["limits"]
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flat.items()}

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> "Settings":
        """What :meth:`parameters` wrote.

        Raises:
            UserError: a value is missing or of the wrong type.
        """
        try:
            return msgspec.convert({**parameters, "limits": parameters}, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UserError(
                f"model parameters: {error}", "those of wan-trt triton", "run wan-trt triton again"
            ) from None


def settings_of(
    bundle: Bundle, limits: Limits, *, engines_at: str = "", residency: ResidencyChoice = "auto", drain_flag: str = ""
) -> Settings:
    """Settings that pin ``bundle`` as it is now; ``engines_at`` is its folder where it will be served.

    Raises:
        UserError: that folder is told relative to one that nobody knows.
    """
    if engines_at and not PurePosixPath(engines_at).is_absolute():
        raise UserError(f"engines at {engines_at}", "a path from the root of the server", "begin it with /")
    return Settings(
        engines=engines_at or str(bundle.folder.resolve()),
        bundle_sha256=sha256_of(bundle.folder / MANIFEST),
        model=bundle.manifest.spec.name,
        limits=limits,
        residency=residency,
        drain_flag=drain_flag,
    )


def check_name(name: str) -> str:
    """Refuses a model name that a path, a shell or a metric could misread."""
    if NAME.fullmatch(name):
        return name
    raise UserError(f"model name {name!r}", "lower-case letters, digits and _", "choose another with --name")
