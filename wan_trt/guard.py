"""Exit codes of every command, and one line for every expected failure.

0: done. 1: a check failed, or a model computed NaN. 2: bad input, or something that the machine lacks. 130:
interrupted. A bug keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from wan22.errors import NonFiniteError, UserError, disk_error
from wan22.memory import available_host_bytes
from wan22.quantities import human_bytes
from wan_trt.console import tolerate_any_encoding
from wan_trt.extras import told_missing


def command_of(run: Callable[..., int | None], program: str) -> typer.Typer:
    """The command line of a program that has one command, such as ``python -m studies.gpu``."""
    tolerate_any_encoding()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(guarded(run, program))
    return app


def guarded(run: Callable[..., int | None], program: str = "wan-trt") -> Callable[..., Any]:
    """``run`` with its result as exit code, expected failures as one line of ``program``, and Ctrl-C as 130."""

    @functools.wraps(run)
    def guard(*args: Any, **kwargs: Any) -> None:
        try:
            code = run(*args, **kwargs)
        except UserError as error:
            print(f"{program}: {error}", file=sys.stderr)
            code = 2
        except MemoryError as error:
            print(f"{program}: {_out_of_memory(error)}", file=sys.stderr)
            code = 2
        except NonFiniteError as error:
            print(f"{program}: {error} | wan-trt validate tells engines and checkpoint apart", file=sys.stderr)
            code = 1
        except (OSError, ModuleNotFoundError) as error:
            if not (line := _line(error, run.__module__.rpartition(".")[2])):
                raise
            print(f"{program}: {line}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print(f"{program}: interrupted; nothing unfinished has its final name", file=sys.stderr)
            code = 130
        raise typer.Exit(code or 0)

    return guard


def _out_of_memory(error: MemoryError) -> str:
    """The line for an allocation that failed; numpy says what it wanted."""
    wanted = f": {error}" if str(error) else ""
    available = human_bytes(available_host_bytes())
    return f"out of memory{wanted} | expected at most {available} | ask for a smaller --size or fewer --frames"


def _line(error: OSError | ModuleNotFoundError, command: str) -> str:
    """The line for an error of the disk or an extra that is not installed; "" for a bug."""
    if isinstance(error, ModuleNotFoundError):
        return told_missing(error.name or "", command)
    return str(disk_error(error) or "")
