"""``wan-trt bundle``: check a bundle, copy it so that it shares nothing, remove what killed commands left."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from wan22.bundle import Bundle, check_disk, kind_of, open_bundle, refuse_existing, staged
from wan22.files import remove_leftovers
from wan_trt.arguments import Overwrite
from wan_trt.console import bars, console, tell_unread

Made = Annotated[Path, typer.Argument(help="A bundle made by wan-trt export or build.", show_default=False)]


def verify(bundle: Made) -> None:
    """Hash every file of a bundle and compare with its manifest, and so what plans say that they were built for."""
    manifest = _whole(bundle).manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    console.print(f"{bundle}: {manifest.kind} of {manifest.spec.name}, {size_bytes / 2**30:.2f} GiB, all hashes match")


def pack(
    bundle: Made,
    folder: Annotated[Path, typer.Argument(help="Where to write the copy.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Copy a bundle, verified, with every linked file made its own: what may leave this file system."""
    refuse_existing(folder, overwrite=overwrite)
    _whole(bundle)
    files = [path for path in bundle.rglob("*") if path.is_file()]  # builders' logs too, which no manifest names
    total, done = sum(file.stat().st_size for file in files), 0
    check_disk(folder, total)
    with staged(folder, overwrite=overwrite) as temporary, bars() as progress:
        for file in files:
            target = temporary / file.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            done += file.stat().st_size
            progress("copy", done, total, "bytes")
    console.print(f"{total / 2**30:.2f} GiB: {folder}")


def clean(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the outputs.")] = Path(),
) -> None:
    """Remove what killed commands left beside their outputs, unfinished exports too, and in the temporary folder."""
    removed = remove_leftovers(folder)
    for leftover, size_bytes in removed.items():
        console.print(f"{leftover}: {size_bytes / 2**30:.2f} GiB removed")
    if not removed:
        console.print(f"{folder}: no leftovers of wan-trt")


def _whole(folder: Path) -> Bundle:
    from runtime.built_for import check_plans

    bundle = open_bundle(folder, kind_of(folder), full_check=True)
    tell_unread(check_plans(bundle))
    return bundle
