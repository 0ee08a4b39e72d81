"""Carry wheels to a machine without a network, through a channel that takes small files.

    python -m studies.gpu.pack onnxruntime_gpu-*.whl wan_trt-*.whl -o parts      # here
    python -m studies.gpu.pack --unpack parts -o site                            # there; then PYTHONPATH=site

A wheel is cut into parts of at most 60 MiB. Each part and each wheel is checked by its hash before anything is
installed, so a part that is missing or damaged is named instead of a package that does not import.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wan22.errors import UserError
from wan22.files import scratch_folder, whole_folder
from wan22.quantities import human_bytes
from wan_trt.console import console
from wan_trt.guard import command_of

PART_BYTES = 60 * 2**20
INDEX = "parts.json"
PROGRAM = "python -m studies.gpu.pack"


def run(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the parts, or for the packages.")],
    wheels: Annotated[list[Path] | None, typer.Argument(help="Wheels to pack.", show_default=False)] = None,
    unpack: Annotated[Path | None, typer.Option(help="Folder of parts to install from.")] = None,
) -> None:
    """Cut wheels into parts, or install the wheels of a folder of parts without a network."""
    if bool(wheels) == bool(unpack):
        raise UserError("wheels and --unpack" if wheels else "nothing to do", "one of the two", "see --help")
    if unpack is not None:
        names = unpack_wheels(unpack, output)
        console.print(f"{', '.join(names)}: {output}")
        return
    parts = pack_wheels(wheels or [], output)
    console.print(f"{parts} parts of at most {human_bytes(PART_BYTES)}: {output}")


def pack_wheels(wheels: list[Path], folder: Path, part_bytes: int = PART_BYTES) -> int:
    """Write the parts of ``wheels`` and their index to ``folder``; return the number of parts.

    Raises:
        UserError: a wheel is missing or is none, or ``folder`` has content. Nothing is written then.
    """
    for wheel in wheels:
        if not wheel.is_file() or wheel.suffix != ".whl":
            raise UserError(f"{wheel}: no wheel", "a file ending in .whl", "name one")
    with whole_folder(folder) as new:
        index: dict[str, Any] = {wheel.name: _cut(wheel, new, part_bytes) for wheel in wheels}
        (new / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(len(entry["parts"]) for entry in index.values())


def _cut(wheel: Path, folder: Path, part_bytes: int) -> dict[str, Any]:
    whole = hashlib.sha256()
    parts: dict[str, str] = {}
    with wheel.open("rb") as file:
        while content := file.read(part_bytes):
            name = f"{wheel.name}.{len(parts):03}"
            (folder / name).write_bytes(content)
            parts[name] = hashlib.sha256(content).hexdigest()
            whole.update(content)
    return {"sha256": whole.hexdigest(), "parts": parts}


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Install the wheels whose parts are in ``folder`` into the new folder ``site``; return their names.

    Raises:
        UserError: no index, a part is missing or damaged, or pip refuses a wheel. ``site`` is complete or absent.
    """
    index = _read_index(folder)
    with scratch_folder("wheels") as place, whole_folder(site) as new:
        wheels = [_join(folder, place / name, entry) for name, entry in index.items()]
        words = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(new), *map(str, wheels)]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise UserError(f"pip: {last}", "wheels for this Python", "pack wheels for it")
    return list(index)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / INDEX}: {error}", "an index of parts", f"pack with {PROGRAM}") from None
    return index


def _join(folder: Path, wheel: Path, entry: dict[str, Any]) -> Path:
    with wheel.open("wb") as file:
        for name, expected in entry["parts"].items():
            path = folder / name
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                found = f"{path}: {'damaged' if content else 'missing'}"
                raise UserError(found, "the part as packed", "copy it again")
            file.write(content)
    return wheel


app = command_of(run, PROGRAM)

if __name__ == "__main__":
    app()
