"""``wan-trt inspect``: the kernels of engines, or the kind of a file of weights."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from wan22.bundle import MANIFEST, kind_of
from wan22.errors import UserError
from wan22.files import whole_file
from wan22.outputs import check_ending, check_no_source
from wan_trt.console import bars, console


def run(
    folder: Annotated[
        Path, typer.Argument(help="Engines, an ONNX bundle (--target), any weights, or a video.", show_default=False)
    ],
    target: Annotated[str | None, typer.Option(help="GPU to compile an ONNX bundle for.")] = None,
    component: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    size: Annotated[str | None, typer.Option(help="As for build.")] = None,
    frames: Annotated[str | None, typer.Option(help="As for build.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a diagram of a block.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of tables.")] = False,
) -> int:
    """Describe engines, a bundle, a checkpoint, a LoRA, a file of weights, or how a video was made.

    For TensorRT engines: kernels, types, copies, memory and roofline times, with exit code 1 if the compiler did badly.
    For other engines and ONNX bundles: their components. For weights: their kind, and how an export would use them.
    """
    if folder.suffix.lower() in (".mp4", ".webm", ".png"):
        return _video(folder, as_json=as_json)
    of_kernels = any(option is not None for option in (target, component or None, size, frames, html))
    if not of_kernels and not (folder / MANIFEST).is_file():
        return _weights(folder, as_json=as_json)
    if not of_kernels:
        from engines.inspect.contents import contents

        whole, components = contents(folder)
        if components or not as_json:
            _print_entries([whole, *components], as_json=as_json)
        if components:
            return 0
    return _kernels(folder, target, (size, frames), component or (), html, as_json=as_json)


def _kernels(
    folder: Path,
    target: str | None,
    video: tuple[str | None, str | None],
    components: Sequence[str],
    html: Path | None,
    *,
    as_json: bool,
) -> int:
    from engines.inspect.inspection import inspect_bundle, inspect_engines
    from engines.inspect.views import as_html, as_text, blocks_as_text, problems_as_text

    check_no_source(html, folder)
    if html is not None:
        check_ending(html, "--html", ".html")
    page = whole_file(html, "page", make_folder=False) if html is not None else nullcontext()
    with page as new:
        if target is None:
            if video != (None, None):
                raise UserError("--size or --frames", "an ONNX bundle to compile", "name a --target as well")
            if kind_of(folder) == "graphs":
                raise UserError(f"{folder} is an ONNX bundle", "engines, or a target to compile it for", "add --target")
            reports = inspect_engines(folder, components)
        else:
            with bars(to_stderr=as_json) as progress:
                reports = inspect_bundle(folder, target, video, components, progress)
        if new is not None:
            new.write_text(as_html(reports, str(folder)), encoding="utf-8")
    if as_json:
        print(json.dumps([report.summary() for report in reports]))
    else:
        tables = (part for report in reports for part in as_text(report))
        for part in (*tables, *blocks_as_text(reports), *problems_as_text(reports)):
            console.print(part)
    return 1 if any(report.problems for report in reports) else 0


def _weights(path: Path, *, as_json: bool) -> int:
    from engines.inspect.contents import WEIGHTS, weights_contents
    from export.lora.inspection import inspect_weights

    entries = [weights_contents(path)] if path.suffix == WEIGHTS and path.is_file() else inspect_weights(path)
    return _print_entries(entries, as_json=as_json)


def _print_entries(entries: list[dict[str, Any]], *, as_json: bool) -> int:
    from export.lora.inspection import as_lines

    if as_json:
        print(json.dumps(entries))
        return 0
    for entry in entries:
        for line in as_lines(entry):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _video(path: Path, *, as_json: bool) -> int:
    """Print the metadata of a video; characters that control a terminal are escaped."""
    from runtime.recipe import read_recipe

    settings = msgspec.to_builtins(read_recipe(path))
    if as_json:
        print(json.dumps(settings))
        return 0
    for name, value in settings.items():
        console.print(f"{name.replace('_', ' ')}: {json.dumps(value, ensure_ascii=False)}")
    return 0
