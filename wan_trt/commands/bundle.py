"""``wan-trt bundle``: check a bundle completely, or make a copy of it that shares nothing with other folders."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from wan22.bundle import MANIFEST, Bundle, check_disk, kind_of, open_bundle, refuse_existing, staged
from wan22.onnx_file import check_graphs
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
    named = _whole(bundle).manifest.files()
    files = [bundle / path for path in (MANIFEST, *named)]
    files += [path for path in bundle.rglob("*.log") if path.is_file() and not path.is_symlink()]  # of builders
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


def _whole(folder: Path) -> Bundle:
    from runtime.built_for import check_plans

    bundle = open_bundle(folder, kind_of(folder), full_check=True)
    check_graphs(bundle)
    tell_unread(check_plans(bundle))
    return bundle
