"""Refuse outputs that would replace an input, or for which the disk has no room."""

import shutil
from pathlib import Path

import msgspec

from wan22.bundle import MANIFEST
from wan22.errors import DAMAGED_JSON, UserError
from wan22.quantities import human_bytes

REMEDY = ("an output apart from the inputs", "choose another name")


def check_no_source(output: Path | None, *sources: object) -> None:
    """Refuse to write ``output``, a file or a folder that is replaced as a whole, over one of ``sources``.

    ``sources`` that are no paths, or paths of nothing, are ignored.

    Raises:
        UserError: the output is a source under this or another name, contains one, or belongs to a source folder. A new
            file may be added to a source folder.
    """
    if output is None or not output.exists():
        return
    place = output.resolve()
    for source in sources:
        if not isinstance(source, Path) or not source.exists():
            continue
        found = source.resolve()
        if output.samefile(source):
            raise UserError(f"{output} is an input", *REMEDY)
        if found.is_relative_to(place):
            raise UserError(f"{output} holds the input {source}", *REMEDY)
        if place.is_file() and place.is_relative_to(found) and _belongs(place.relative_to(found).as_posix(), found):
            raise UserError(f"{output} belongs to the input {source}", *REMEDY)


def check_apart(*outputs: Path | None) -> None:
    """Refuse two outputs with one name. Raises UserError."""
    places: set[Path] = set()
    for output in filter(None, outputs):
        if output.resolve() in places:
            raise UserError(f"{output} for two outputs", "a name for each", REMEDY[1])
        places.add(output.resolve())


def check_ending(output: Path, option: str, ending: str) -> None:
    """Refuse a file of another name for what replaces earlier files: it may be something else. Raises UserError."""
    if output.suffix.lower() != ending and (output.is_file() or not output.exists()):
        raise UserError(f"{option} {output}", f"a file that ends in {ending}", f"add {ending} to the name")


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to write more than the disk of ``folder``, which need not exist, can hold."""
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    usage = shutil.disk_usage(existing)
    if not usage.total:  # /proc, /sys
        found = f"cannot write {folder}: {existing} is not on a disk"
        raise UserError(found, "a writable file system", "choose another place")
    if usage.free < needed_bytes:
        free, needed = human_bytes(usage.free, 1), human_bytes(needed_bytes, 1)
        raise UserError(f"{free} free at {existing}", f"{needed} for {folder.name}", "free some or choose another disk")


def _belongs(name: str, folder: Path) -> bool:
    """True for a file that a bundle's manifest lists, and for every file of a folder without a manifest."""
    if not (folder / MANIFEST).is_file():
        return True
    try:
        return name == MANIFEST or name in _paths(msgspec.json.decode((folder / MANIFEST).read_bytes()))
    except DAMAGED_JSON:
        return False


def _paths(content: object) -> set[str]:
    """Every "path" in the manifest."""
    if isinstance(content, dict):
        own = {content["path"]} if isinstance(content.get("path"), str) else set()
        return own.union(*map(_paths, content.values()))
    return set().union(*map(_paths, content)) if isinstance(content, list) else set()
