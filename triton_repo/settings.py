"""The settings of a served model: its engines and the limits of requests.

They are written to ``config.pbtxt`` as string parameters and read by the model.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import msgspec

from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from wan22.block_memory import WeightsIn
from wan22.bundle import MANIFEST, Bundle, Manifest, Source, sha256_of
from wan22.errors import UserError
from wan22.residency import ResidencyChoice
from wan22.specs import ModelSpec

MEBIBYTE = 2**20
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
FAMILY = "wan2.2-"


def public_name(spec: ModelSpec) -> str:
    """The name by which clients of the gateway know the model."""
    return spec.name if spec.name.startswith(FAMILY) else FAMILY + spec.name


@dataclass(frozen=True)
class Limits:
    """The limits of a request, checked before any work on it."""

    max_pixels: int  # width times height of the video
    max_frames: int
    max_steps: int = 100
    max_prompt_bytes: int = 16 * 1024  # per prompt; 512 tokens need far less
    max_image_bytes: int = 32 * MEBIBYTE
    max_image_pixels: int = 33_000_000  # by the header, before decoding
    max_raw_bytes: int = 128 * MEBIBYTE  # for frames_npz, 81 frames of 832x480; a server is slow with large answers
    max_queue_size: int = 8  # waiting jobs per priority; more are refused at once
    queue_timeout_s: int = 3600  # longest wait, after which a job is refused
    longest_job_s: int = 3600  # longest run, after which a job ends; a shutdown waits this long too

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} {value}", "at least 1", "raise it")

    @classmethod
    def of(cls, spec: ModelSpec, **changed: int | None) -> "Limits":
        """The largest official size and length of ``spec``, except the ``changed`` limits that are not None."""
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
    residency: ResidencyChoice = "auto"  # engines that stay loaded between jobs, see :class:`runtime.pipeline.Pipeline`
    warm_up: bool = True  # run one smallest job before the model is ready
    full_check: bool = True  # hash every file at load, not only those under 1 GiB
    drain_flag: str = ""  # while this file exists, the model reports that it is not ready
    weights_in: WeightsIn = "auto"  # where the weights of engines in blocks are
    vram_bytes: float = 0.0  # the most that a transformer in blocks may take; 0: what is free
    vae_strips: int = 0  # strips in which the VAE takes pictures; 0: as many as memory needs
    gpus: str = ""  # the devices, as "0,1"; empty: the first
    parallel: str = ""  # how they divide the work
    loras: str = ""  # JSON: name → folder of the weight set and the hash of its bundle.json
    described: str = ""  # JSON: the manifest without its files, for clients that check requests themselves
    # BLS only
    components: str = ""  # prefix of the engines' models, before an underscore and the component's name
    component: str = ""  # the component that this model runs

    @property
    def blocks(self) -> BlockOptions:
        memory = (self.weights_in, self.vram_bytes or None, self.vae_strips or None)
        return BlockOptions(*memory, self.gpus or None, self.parallel or None)

    def weight_sets(self) -> dict[str, tuple[str, str]]:
        """Folder and hash of the manifest of every weight set, by name."""
        return msgspec.json.decode(self.loras, type=dict[str, tuple[str, str]]) if self.loras else {}

    def parameters(self) -> dict[str, str]:
        """All values as text by name, limits included, for a Triton configuration."""
        flat = {**asdict(self), **asdict(self.limits)}
        del flat["limits"]
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flat.items()}

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> "Settings":
        """Parse the result of :meth:`parameters`.

        Raises:
            UserError: a value is missing or of the wrong type.
        """
        try:
            return msgspec.convert({**parameters, "limits": parameters}, cls, strict=False)
        except msgspec.ValidationError as error:
            found = f"model parameters: {error}"
            raise UserError(found, "those of wan-trt triton", "run wan-trt triton again") from None


def settings_of(
    bundle: Bundle,
    limits: Limits,
    *,
    engines_at: str = "",
    residency: ResidencyChoice = "auto",
    drain_flag: str = "",
    loras: Mapping[str, Path] | None = None,
    blocks: BlockOptions = BLOCKS_AS_FIT,
) -> Settings:
    """Settings that pin the present content of ``bundle``; ``engines_at`` is its folder on the serving machine.

    Raises:
        UserError: ``engines_at`` is not absolute.
    """
    if engines_at and not PurePosixPath(engines_at).is_absolute():
        raise UserError(f"engines at {engines_at}", "an absolute path on the server", "begin it with /")
    return Settings(
        engines=engines_at or str(bundle.folder.resolve()),
        bundle_sha256=sha256_of(bundle.folder / MANIFEST),
        model=bundle.manifest.spec.name,
        limits=limits,
        residency=residency,
        drain_flag=drain_flag,
        weights_in=blocks.weights_in,
        vram_bytes=blocks.vram or 0.0,
        vae_strips=blocks.vae_strips or 0,
        gpus=blocks.gpus or "",
        parallel=blocks.parallel or "",
        loras=_pinned(loras) if loras else "",
        described=msgspec.json.encode(_without_files(bundle.manifest)).decode(),
    )


def _without_files(manifest: Manifest) -> Manifest:
    """``manifest`` without components, folders, commands and the build's options."""
    build = None if manifest.build is None else replace(manifest.build, options={}, attention_scales={}, nodes={})
    nowhere = Source("", manifest.source.layout, manifest.source.fingerprint)
    return replace(manifest, components=(), tokenizer=(), source=nowhere, command="", build=build)


def _pinned(loras: Mapping[str, Path]) -> str:
    pinned = {name: (str(folder.resolve()), sha256_of(folder / MANIFEST)) for name, folder in loras.items()}
    return msgspec.json.encode(pinned).decode()


def check_name(name: str) -> str:
    """Refuse a model name that is not safe in paths, shells and metrics; return it otherwise."""
    if NAME.fullmatch(name):
        return name
    raise UserError(f"model name {name!r}", "lower-case letters, digits and _", "choose another with --name")
