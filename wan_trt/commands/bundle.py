"""``wan-trt bundle``: check a bundle, copy it so that it shares nothing, remove what killed commands left."""

from pathlib import Path
from typing import Annotated

import typer

from wan22.bundle import kind_of, open_bundle
from wan22.files import remove_leftovers
from wan22.onnx_file import check_graphs
from wan22.quantities import human_bytes
from wan_trt.arguments import Overwrite
from wan_trt.console import bars, console, tell_unread

Made = Annotated[Path, typer.Argument(help="A bundle made by wan-trt export or build.", show_default=False)]


def verify(
    bundle: Made,
    key: Annotated[Path | None, typer.Option(help="Public Ed25519 key (PEM) that must have signed it.")] = None,
) -> None:
    """Check every file of a bundle against the hashes of its manifest, and compiled plans against their targets."""
    from runtime.built_for import check_plans

    if key is not None:
        from runtime.signature import check_signature

        check_signature(bundle, key)
    whole = open_bundle(bundle, kind_of(bundle), full_check=True)
    check_graphs(whole)
    tell_unread(check_plans(whole))
    manifest = whole.manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    console.print(f"{bundle}: {manifest.kind} of {manifest.spec.name}, {human_bytes(size_bytes)}, all hashes match")


def sign(
    bundle: Made,
    key: Annotated[Path, typer.Option(help="Private Ed25519 key (PEM).", show_default=False)],
) -> None:
    """Sign a bundle: verify every hash, then write bundle.json.sig."""
    from runtime.signature import sign

    console.print(f"{sign(bundle, key)}: signed")


def pack(
    bundle: Made,
    folder: Annotated[Path, typer.Argument(help="Where to write the copy.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Copy a bundle so that it shares no file with another one and can be moved."""
    from runtime.built_for import check_plans
    from wan_trt.recipes.pack import pack

    with bars() as progress:
        packed = pack(bundle, folder, overwrite=overwrite, progress=progress)
    tell_unread(check_plans(packed))
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{human_bytes(size_bytes)}: {folder}")


def clean(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the outputs.")] = Path(),
) -> None:
    """Remove what killed commands left in a folder and in the temporary folder, unfinished exports too."""
    removed = remove_leftovers(folder)
    for leftover, size_bytes in removed.items():
        console.print(f"{leftover}: {human_bytes(size_bytes)} removed")
    if not removed:
        console.print(f"{folder}: no leftovers of wan-trt")
