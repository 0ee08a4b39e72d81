"""The ``wan-trt`` command: collects the subcommands."""

import contextlib
import logging
import os
import sys
from pathlib import Path

import typer

from wan22.errors import UserError
from wan_trt.commands import (
    bench,
    build,
    bundle,
    calibrate,
    client,
    demo,
    export,
    generate,
    inspect,
    lora,
    plan,
    presets,
    serve,
    synth,
    triton,
    validate,
)
from wan_trt.guard import guarded

app = typer.Typer(
    name="wan-trt",
    help="Wan2.2 video generation: PyTorch checkpoint → ONNX → engines → video, with proof of parity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


for command in (
    plan,
    presets,
    synth,
    export,
    calibrate,
    build,
    inspect,
    generate,
    validate,
    bench,
    demo,
    triton,
    serve,
    client,
):
    app.command(command.__name__.rpartition(".")[2])(guarded(command.run))


@app.command(
    "scale",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@guarded
def scale() -> None:
    """The old name of ``python -m studies.full_size``, whatever follows it."""
    raise UserError("wan-trt scale has moved", "python -m studies.full_size", "run it in a checkout of the source")


bundles = typer.Typer(no_args_is_help=True, help="Check a bundle, make one that can be moved, or clean up.")
for verb in (bundle.verify, bundle.pack, bundle.clean):
    bundles.command(verb.__name__)(guarded(verb))
app.add_typer(bundles, name="bundle")
loras = typer.Typer(no_args_is_help=True, help="Other LoRAs for engines with external weights.")
loras.command("apply")(guarded(lora.apply))
loras.callback()(lambda: None)  # keeps "apply" a word of its own while it is the only one
app.add_typer(loras, name="lora")


def main() -> None:
    """Runs one command line, unless a word of it or the folder that it runs in is not UTF-8, as all files of it are."""
    words = [os.fsencode(word) for word in sys.argv[1:]]
    with contextlib.suppress(OSError):  # the folder may be gone
        words.append(os.fsencode(Path.cwd()))
    for word in words:
        try:
            word.decode()
        except UnicodeDecodeError:
            print(f"wan-trt: {word!r} | expected UTF-8 | rename it, or set a UTF-8 locale", file=sys.stderr)
            sys.exit(2)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
