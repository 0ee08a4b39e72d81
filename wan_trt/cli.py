"""The ``wan-trt`` command: collects the subcommands and turns errors into exit codes.

0: done. 1: a check failed, or a model computed NaN. 2: bad input, or what the machine lacks, told in one line. 130:
interrupted. A bug keeps its traceback.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from wan22.errors import NonFiniteError, UserError, disk_error
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
    scale,
    serve,
    synth,
    triton,
    validate,
)
from wan_trt.extras import told_missing

app = typer.Typer(
    name="wan-trt",
    help="Wan2.2 video generation: PyTorch checkpoint → ONNX → engines → video, with proof of parity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def guarded(run: Callable[..., int | None]) -> Callable[..., Any]:
    """``run`` with its result as exit code, what is no bug as one line, and Ctrl-C as 130."""

    @functools.wraps(run)
    def guard(*args: Any, **kwargs: Any) -> None:
        try:
            code = run(*args, **kwargs)
        except UserError as error:
            print(f"wan-trt: {error}", file=sys.stderr)
            code = 2
        except NonFiniteError as error:
            print(f"wan-trt: {error} | wan-trt validate tells engines and checkpoint apart", file=sys.stderr)
            code = 1
        except (OSError, ModuleNotFoundError) as error:
            if not (told := _told(error, run.__module__.rpartition(".")[2])):
                raise
            print(f"wan-trt: {told}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("wan-trt: interrupted; nothing unfinished has its final name", file=sys.stderr)
            code = 130
        raise typer.Exit(code or 0)

    return guard


def _told(error: OSError | ModuleNotFoundError, command: str) -> str:
    """The line for what no bug explains: an error of the disk, an extra that is not installed."""
    if isinstance(error, ModuleNotFoundError):
        return told_missing(error.name or "", command)
    return str(disk_error(error) or "")


for command in (
    plan,
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
    scale,
):
    app.command(command.__name__.rpartition(".")[2])(guarded(command.run))


bundles = typer.Typer(no_args_is_help=True, help="Check a bundle, make one that can be moved, or clean up.")
for verb in (bundle.verify, bundle.pack, bundle.clean):
    bundles.command(verb.__name__)(guarded(verb))
app.add_typer(bundles, name="bundle")
loras = typer.Typer(no_args_is_help=True, help="Other LoRAs for engines with external weights.")
loras.command("apply")(guarded(lora.apply))
loras.callback()(lambda: None)  # keeps "apply" a word of its own while it is the only one
app.add_typer(loras, name="lora")


def main() -> None:
    """Runs one command line. Words that are not UTF-8 can be in no report, manifest or prompt, so none is begun."""
    for word in map(os.fsencode, sys.argv[1:]):
        try:
            word.decode()
        except UnicodeDecodeError:
            print(f"wan-trt: {word!r} | expected UTF-8 | rename it, or set a UTF-8 locale", file=sys.stderr)
            sys.exit(2)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
