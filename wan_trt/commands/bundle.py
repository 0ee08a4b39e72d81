"""``wan-trt bundle``: verify, sign or copy a bundle, or remove leftovers of killed commands."""

from pathlib import Path
from typing import Annotated

import typer

from wan22.bundle import kind_of, open_bundle
from wan22.errors import UserError
from wan22.files import remove_leftovers
from wan22.onnx_file import check_graphs
from wan22.quantities import human_bytes
from wan_trt.arguments import Overwrite
from wan_trt.console import bars, console, report_unstamped

Made = Annotated[Path, typer.Argument(help="A bundle made by wan-trt export or build.", show_default=False)]


def verify(
    bundle: Made,
    key: Annotated[Path | None, typer.Option(help="Public Ed25519 key (PEM) that must have signed it.")] = None,
) -> None:
    """Check the files of a bundle against the hashes in its manifest, and compiled plans against their targets."""
    from runtime.built_for import check_plans

    if key is not None:
        from runtime.signature import check_signature

        check_signature(bundle, key)
    whole = open_bundle(bundle, kind_of(bundle), full_check=True)
    check_graphs(whole)
    report_unstamped(check_plans(whole))
    manifest = whole.manifest
    size_bytes = sum(file.size_bytes for file in manifest.files().values())
    signed = f", signed by the owner of {key}" if key is not None else ""
    shown = f"{manifest.kind} of {manifest.spec.name}, {human_bytes(size_bytes)}, all hashes match{signed}"
    console.print(f"{bundle}: {shown}")


def sign(
    bundle: Made, key: Annotated[Path, typer.Option(help="Private Ed25519 key (PEM).", show_default=False)]
) -> None:
    """Sign a bundle: verify every hash, then write bundle.json.sig."""
    from runtime.signature import sign

    console.print(f"{sign(bundle, key)}: signed")


def pack(
    bundle: Made,
    folder: Annotated[Path, typer.Argument(help="Folder to write the copy to.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Copy a bundle so that it shares no files with others and can be moved."""
    from runtime.built_for import check_plans
    from wan_trt.recipes.pack import pack

    with bars() as progress:
        packed = pack(bundle, folder, overwrite=overwrite, progress=progress)
    report_unstamped(check_plans(packed))
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{human_bytes(size_bytes)}: {folder}")


def clean(folder: Annotated[Path, typer.Argument(help="Folder with the outputs.")] = Path()) -> None:
    """Remove leftovers of killed commands, unfinished exports too, from a folder and the temporary folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "the folder in which outputs are", "check the path")
    removed = remove_leftovers(folder)
    for leftover, size_bytes in removed.items():
        console.print(f"{leftover}: {human_bytes(size_bytes)} removed")
    if not removed:
        console.print(f"{folder}: no leftovers of wan-trt")
