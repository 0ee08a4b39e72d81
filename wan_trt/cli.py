"""The ``wan-trt`` command: collects the subcommands and turns errors into exit codes.

0: done. 1: a check failed, or a model computed NaN. 2: bad input, or what the machine lacks, told in one line. 130:
interrupted. A bug keeps its traceback.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import typer

from wan22.errors import DISK_FULL, NonFiniteError, UserError
from wan22.memory import available_host_bytes, gib
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
        except MemoryError as error:
            print(f"wan-trt: {_out_of_memory(error)}", file=sys.stderr)
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


def _out_of_memory(error: MemoryError) -> str:
    """The line for an allocation that failed; numpy says what it wanted."""
    wanted = f": {error}" if str(error) else ""
    available = gib(available_host_bytes())
    return f"out of memory{wanted} | expected at most {available} | ask for a smaller --size or fewer --frames"


def _told(error: OSError | ModuleNotFoundError, command: str) -> str:
    """The line for what no bug explains: a full disk, a file that is not the user's, an extra that is not installed."""
    if isinstance(error, ModuleNotFoundError):
        return told_missing(error.name or "", command)
    if error.errno in DISK_FULL:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"disk full{where} | expected free space | free some and run again"
    if isinstance(error, PermissionError):
        return f"{error.filename}: {error.strerror} | expected what this user may use | change its mode or the user"
    return ""


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


bundles = typer.Typer(no_args_is_help=True, help="Check a bundle, or make one that can be moved.")
for verb in (bundle.verify, bundle.pack):
    bundles.command(verb.__name__)(guarded(verb))
app.add_typer(bundles, name="bundle")
loras = typer.Typer(no_args_is_help=True, help="Other LoRAs for engines with external weights.")
loras.command("apply")(guarded(lora.apply))
loras.callback()(lambda: None)  # keeps "apply" a word of its own while it is the only one
app.add_typer(loras, name="lora")


def main() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
