"""A bundle: the folder that one stage writes and the next one reads, described by its ``bundle.json``.

A bundle gets its final name when it is complete (:mod:`wan22.files`). A reader checks format, kind and every hash
before it uses the content, and names the field that is wrong.
"""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from wan22.component import Component, File
from wan22.errors import DAMAGED_JSON, UserError
from wan22.files import check_room, whole_folder
from wan22.precision import Precision
from wan22.specs import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
HASHED_AT_OPEN_MAX_BYTES = 2**30  # larger files are checked by size when opened, by hash when built or verified

Kind = Literal["graphs", "engines"]
STAGE_OF: dict[Kind, str] = {"graphs": "wan-trt export", "engines": "wan-trt build"}


@dataclass(frozen=True)
class Source:
    """The origin of the weights. ``fingerprint`` covers names, dtypes, shapes, sizes and a few bytes of all files."""

    checkpoint: str
    layout: str  # name of the module that read it
    fingerprint: str
    commit: str = ""  # of the hub's repository, if downloaded from there


@dataclass(frozen=True)
class MergedLora:
    file: str
    sha256: str
    strength: float
    experts: tuple[str, ...]
    config_sha256: str = ""  # of the adapter's configuration next to the file, if one determines its scale

    def shown(self, spec: ModelSpec) -> str:
        """As a command takes it, without its folder: ``style.safetensors@0.8:high``."""
        only = "" if len(self.experts) == len(spec.experts) else f":{self.experts[0].removesuffix('_noise')}"
        return f"{Path(self.file).name}@{self.strength:g}{only}"


@dataclass(frozen=True)
class Build:
    """The build that made the engines of a bundle of kind "engines"."""

    target: str
    backend: str
    backend_version: str
    compute_capability: str  # "8.9", or "" for a backend without one
    profiles: tuple[dict[str, tuple[int, int, int]], ...]  # named dimension → min, opt, max; none: any shape
    options: dict[str, str]
    seconds: float
    peak_rss_bytes: int = 0  # the build's peak
    attention_scales: dict[str, float] = field(default_factory=dict)  # FP8 scales of Q and K, in stages
    nodes: dict[str, str] = field(default_factory=dict)  # those with CUDA kernels, counted, by component


@dataclass(frozen=True)
class Manifest:
    kind: Kind
    spec: ModelSpec
    precision: Precision
    components: tuple[Component, ...]
    tokenizer: tuple[File, ...]
    source: Source
    command: str
    size: tuple[int, int, int] | None = None  # width, height, frames if the shapes are fixed
    loras: tuple[MergedLora, ...] = ()
    build: Build | None = None
    format_version: int = FORMAT_VERSION
    own_sha256: str = ""  # of the manifest with this field empty

    @property
    def precision_text(self) -> str:
        """The precision of the transformers: ``bf16``, ``nvfp4 with rank 32``, or ``nvfp4 and fp8`` of two experts."""
        experts = [component for component in self.components if component.name in self.spec.experts]
        of_experts = [f"{each.precision}{f' with rank {each.low_rank}' if each.low_rank else ''}" for each in experts]
        return " and ".join(dict.fromkeys(of_experts)) or str(self.precision)

    def files(self) -> dict[str, File]:
        """Every file of the bundle by path; weights that graphs share appear once."""
        parts = [f for c in self.components for f in (c.graph, *c.halves, *c.weights, *(s.graph for s in c.stages))]
        return {file.path: file for file in (*parts, *self.tokenizer)}


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: Manifest

    def in_groups(self, count: int) -> "Bundle":
        """The bundle as ``count`` devices see it that divide the tokens."""
        components = tuple(component.in_groups(count) for component in self.manifest.components)
        return replace(self, manifest=replace(self.manifest, components=components))

    def component(self, name: str) -> Component:
        for component in self.manifest.components:
            if component.name == name:
                return component
        have = ", ".join(c.name for c in self.manifest.components)
        raise UserError(f"component {name!r} of {self.folder}", f"one of {have}", "export the model that has it")

    def path(self, file: File) -> Path:
        return self.folder / file.path


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entry(folder: Path, path: Path) -> File:
    """The manifest's entry for a file inside ``folder``."""
    return File(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)


def staged(folder: Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Yield an empty folder that becomes ``folder`` if the block succeeds; raises as :func:`refuse_existing`."""
    return whole_folder(folder, MANIFEST if overwrite else "")


def refuse_existing(folder: Path, kind: Kind, *, overwrite: bool) -> None:
    """Refuse to overwrite anything except a bundle of the same kind, and that only with ``overwrite``.

    Raises:
        UserError: a bundle of the other kind, which may be the source of this one; and as :func:`check_room`.
    """
    check_room(folder, MANIFEST if overwrite else "")
    if (found := _declared_kind(folder)) not in (None, kind):
        raise UserError(f"{folder} holds {found}", f"{kind}, or a new folder", "choose another folder")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    signed = replace(manifest, own_sha256=_own_sha256(msgspec.to_builtins(manifest)))
    text = msgspec.json.format(msgspec.json.encode(signed), indent=2)
    (folder / MANIFEST).write_bytes(text + b"\n")


def _own_sha256(content: dict[str, Any]) -> str:
    """The hash of the stored content, including fields that this version does not know."""
    return hashlib.sha256(msgspec.json.encode(content | {"own_sha256": ""})).hexdigest()


def open_bundle(folder: Path, kind: Kind, *, full_check: bool = False) -> Bundle:
    """Read and check the bundle in ``folder``. ``full_check`` also hashes files over 1 GiB.

    Raises:
        UserError: no bundle, another kind or version, an unreadable manifest, a missing, resized or edited file.
    """
    manifest = read_manifest(folder, kind)
    for file in manifest.files().values():
        _check_file(folder, file, _again(manifest, folder), full_check=full_check)
    return Bundle(folder, manifest)


def _again(manifest: Manifest, folder: Path) -> str:
    """The remedy for a damaged bundle: the command that made it, if a command did."""
    command = manifest.command
    if not command.startswith("wan-trt "):
        return f"run {STAGE_OF[manifest.kind]} again"
    if folder.resolve().name not in (Path(word).name for word in command.split()):
        return f"copy it again, or run {command}"  # which made the bundle that this is a copy of
    return f"run {overwriting(command)}"


def overwriting(command: str) -> str:
    """``command`` so that it replaces what it made before."""
    return command if "--overwrite" in command else f"{command} --overwrite"


def kind_of(folder: Path) -> Kind:
    """The kind of the bundle in ``folder``, without any further check."""
    if (kind := _declared_kind(folder)) is not None:
        return kind
    expected = f"a folder made by {' or '.join(STAGE_OF.values())}"
    raise UserError(f"{folder} is not a bundle", expected, "name that folder")


def _declared_kind(folder: Path) -> Kind | None:
    """The kind that a manifest in ``folder`` declares; ``None`` without a manifest that declares one."""
    try:
        found = msgspec.json.decode((folder / MANIFEST).read_bytes()).get("kind")
    except PermissionError:  # it may be one
        raise
    except (OSError, *DAMAGED_JSON, AttributeError):
        return None
    return next((kind for kind in STAGE_OF if found == kind), None)


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """The manifest of ``folder``, without checking the files that it names.

    Raises:
        UserError: it is missing, of another kind or version, unreadable or edited, or names a component amiss.
    """
    stage, path = STAGE_OF[kind], folder / MANIFEST
    try:
        content = path.read_bytes()
    except PermissionError:
        raise
    except OSError:
        raise UserError(f"{folder} has no {MANIFEST}", f"a folder made by {stage}", f"run {stage} first") from None
    try:
        head = msgspec.json.decode(content)
        version, holds = head.get("format_version"), head.get("kind")
        if version == FORMAT_VERSION and holds != kind and holds in list(STAGE_OF):
            raise UserError(f"{folder} holds {holds}", f"{kind}, a folder made by {stage}", "name that folder")
        if (version, holds) != (FORMAT_VERSION, kind):
            expected = f"format {FORMAT_VERSION}, kind {kind}"
            raise UserError(f"{path}: format {version}, kind {holds}", expected, f"run {stage} of this version")
        manifest = msgspec.json.decode(content, type=Manifest)
    except (*DAMAGED_JSON, AttributeError) as error:
        raise UserError(f"{path}: {error}", "the manifest as written", f"run {stage} again") from None
    if (digest := _own_sha256(head)) != manifest.own_sha256:
        expected = f"{manifest.own_sha256[:12]}… as recorded in it"
        raise UserError(f"{path} was edited: sha256 {digest[:12]}…", expected, f"run {stage} again")
    for component in manifest.components:
        if not component.name.isidentifier():  # files are named after it
            name = f"{path}: a component named {component.name!r}"
            raise UserError(name, "letters, digits and underscores", f"run {stage} again")
    if manifest.build is not None and manifest.build.options.get("weights") == "external":
        remedy = f"export and build again: {manifest.command.replace(' --weights external', '')} --overwrite"
        raise UserError(f"{folder} has whole engines with external weights", "engines in blocks", remedy)
    return manifest


def _is_inside(path: Path, folder: Path) -> bool:
    """False also for what is no path on any disk: a name with a NUL, a link to itself."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError):
        return False


def _check_file(folder: Path, file: File, again: str, *, full_check: bool) -> None:
    path = folder / file.path
    if not _is_inside(path, folder):
        raise UserError(f"{folder / MANIFEST}: path {file.path}", "a path inside the bundle", again)
    if not path.is_file():
        raise UserError(f"{path} is missing", "every file the manifest names", again)
    if (size := path.stat().st_size) != file.size_bytes:
        raise UserError(f"{path}: {size} bytes", f"{file.size_bytes} bytes", again)
    if size > HASHED_AT_OPEN_MAX_BYTES and not full_check:
        return
    try:
        digest = sha256_of(path)
    except OSError as error:
        found, expected = f"{path}: {error.strerror}", "a file that can be read"
        raise UserError(found, expected, "check its permissions and its disk") from error
    if digest != file.sha256:
        raise UserError(f"{path}: sha256 {digest[:12]}…", f"{file.sha256[:12]}… of {MANIFEST}", again)
