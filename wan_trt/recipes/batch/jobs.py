"""A file of jobs, one JSON object a line, and the lines of results."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from runtime.built_for import fill_defaults
from triton_repo.job_request import request_of
from triton_repo.schema import ANY, INPUTS_BY_NAME, ONE_FRAME, VIDEO_FORMATS, Dtype, Setting
from triton_repo.wire import content_of
from wan22.bundle import Manifest
from wan22.errors import UserError, shortened
from wan22.inputs import check_regular
from wan22.looks import with_terms
from wan22.shapes import parse_size
from wan_trt.recipes.noise_file import read_noise

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
OWN_KEYS = ("name", "size", "frames", "look")  # of a line, beside the inputs of the served model
SERVERS_ONLY = ("lora",)  # weight sets are loaded by wan-trt serve --lora
NOT_OURS = (
    "progress_every", "preview", "deadline_ms", "deadline_unix_ms", "errors_as_events", "written_prompt", "extended_by",
)  # fmt: skip
KEYS = (*OWN_KEYS, *(name for name in INPUTS_BY_NAME if name not in NOT_OURS))
TYPES: Mapping[Dtype, type | tuple[type, ...]] = {
    "STRING": str, "UINT8": str, "INT32": int, "INT64": int, "FP32": (int, float), "BOOL": bool,
}  # fmt: skip
RANGES = {"fps": (1, 240), "quality": (1, 10)}
LINE_MOST_BYTES, JOBS_MOST_BYTES = 1024 * 1024, 2**30


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of ``results.jsonl``."""

    name: str
    status: Literal["done", "failed"]
    job: str  # SHA-256 of the job's settings and images
    engines: str  # SHA-256 of the bundle's manifest; "servers" where servers rendered
    line: int  # of the file of jobs
    file: str = ""
    seed: int = -1  # of a job that was not tried
    seconds: float = 0.0  # in the worker
    sha256: str = ""  # of the file
    worker: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "error", self.error.encode(errors="backslashreplace").decode())


@dataclass(frozen=True)
class Job:
    line: int
    name: str
    settings: dict[str, Setting]  # by the names of triton_repo.schema; images and noise as bytes
    sha256: str

    @property
    def format(self) -> str:
        return str(self.settings.get("output_format", "mp4"))

    @property
    def file(self) -> str:
        return self.name + VIDEO_FORMATS[self.format]


def read_jobs(path: Path) -> Iterator[Job | Result]:
    """The jobs of a file of JSON lines; a broken line is a failed result, named by its "name" or its number.

    Raises:
        UserError: the file cannot be read, has no jobs, or two jobs of one name.
    """
    try:
        check_regular(path)
        if path.stat().st_size > JOBS_MOST_BYTES:
            raise UserError(f"{path}: more than 1 GiB", "a file of jobs", "split it")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a file of jobs, one JSON object a line", "name one") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = unnamed(number)
        try:
            entry = _entry(line)
            name = _name(entry.get("name", name))
            found: Job | Result = _job(number, name, entry, path.parent)
        except UserError as error:
            found = Result(
                name, "failed", hashlib.sha256(line).hexdigest(), "", number, error=f"line {number}: {error}"
            )
        if name in seen:
            expected = "a name of its own for every job"
            raise UserError(f"{path}: {name!r} in lines {seen[name]} and {number}", expected, "rename one")
        seen[name] = number
        yield found
    if not seen:
        raise UserError(f"{path} has no jobs", 'lines such as {"prompt": "A cat"}', "write one job a line")


def unnamed(line: int) -> str:
    """The name of a job without one."""
    return f"line-{line:05}"


def _entry(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_MOST_BYTES:
        raise UserError("more than 1 MiB", "one job", "give images by their paths")
    try:
        entry = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shortened(str(error))}", "a JSON object in UTF-8", "correct the line") from None
    if not isinstance(entry, dict):
        raise UserError(f"a {type(entry).__name__}", '{"prompt": ...}', "write a JSON object")
    return entry


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{shortened(twice)!r} twice", "it once", "correct the line")
    return entry


def _name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        expected = "letters, digits, '.', '_' and '-', at most 100, no '.' or '-' in front"
        raise UserError(f"name {shortened(str(name))!r}", expected, "rename the job")
    return name


def _job(number: int, name: str, entry: dict[str, Any], folder: Path) -> Job:
    """The job of one line; paths of images are relative to ``folder``."""
    given = dict(entry)
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise UserError(f"{key!r}", near[0] if near else f"one of {', '.join(KEYS)}", "correct the line")
    given.pop("name", None)
    for short, others in (("size", ("width", "height")), ("frames", ("num_frames",))):
        if short in given and (both := [other for other in others if other in given]):
            raise UserError(f"{short} with {', '.join(both)}", "one of them", "leave the other out")
    if isinstance(size := given.pop("size", None), str):
        given["width"], given["height"] = parse_size(size)
    elif size is not None:
        raise UserError(f"size {size!r}", '"832x480"', "correct the line")
    if (frames := given.pop("frames", None)) is not None:
        given["num_frames"] = frames
    looks = given.pop("look", [])
    looks = looks.split(",") if isinstance(looks, str) else looks
    given.setdefault("seed", 0)
    for key, value in given.items():
        given[key] = _value(key, value, folder)
    if not str(given.get("prompt", "")).strip():
        raise UserError("no prompt", "a description of the video", "add a prompt")
    if not isinstance(looks, list) or not all(isinstance(term, str) for term in looks):
        raise UserError(f"look {shortened(str(looks))!r}", "a look or a list of looks and terms", "correct the line")
    given["prompt"] = with_terms(given["prompt"], looks, image="image" in given)
    if given.get("output_format", "mp4") not in VIDEO_FORMATS:
        raise UserError(f"output_format {given['output_format']!r}", ", ".join(VIDEO_FORMATS), "choose one of these")
    digest = hashlib.sha256()
    for key in sorted(given):
        content = given[key] if isinstance(given[key], bytes) else json.dumps(given[key]).encode()
        digest.update(f"{key} {len(content)} ".encode() + content)
    return Job(number, name, given, digest.hexdigest())


def _value(key: str, value: Any, folder: Path) -> Any:
    """The checked value of an input; the content of an image."""
    kind = str if key == "noise" else TYPES[INPUTS_BY_NAME[key].dtype]
    fits: bool = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        expected = {str: "text", bool: "true or false", int: "a whole number"}
        found = f"{key} {shortened(json.dumps(value))}"
        raise UserError(found, expected[kind] if isinstance(kind, type) else "a number", "correct the line")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key} with a NUL", "text", "remove it")
    if key in RANGES and not RANGES[key][0] <= value <= RANGES[key][1]:
        raise UserError(f"{key} {value}", "{} to {}".format(*RANGES[key]), "choose another")
    if key == "noise":
        return read_noise(folder / value).tobytes()
    return content_of(folder / value) if INPUTS_BY_NAME[key].length == ANY else value


def check_job(job: Job, manifest: Manifest) -> None:
    """Refuse a job that the engines of ``manifest`` cannot make. Raises UserError."""
    for name in SERVERS_ONLY:
        if name in job.settings:
            raise UserError(f"{name} without a server", "the engines' own weights", "use --server, or lora apply")
    complete = fill_defaults(request_of(job.settings, manifest.spec), manifest)
    if job.format in ONE_FRAME and complete.frames > 1:
        raise UserError(f"{complete.frames} frames as {job.format}", "one frame", "use mp4, or 1 frame")
