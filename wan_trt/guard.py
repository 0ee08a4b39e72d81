"""Exit codes of every command, and one line for every expected failure.

0: success. 1: a check failed, or a model computed NaN. 2: bad input, or the machine lacks a resource. 130: interrupted
by Ctrl-C or SIGTERM. A bug keeps its traceback.
"""

import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import typer

from wan22.errors import NonFiniteError, UserError, disk_error
from wan22.memory import available_host_bytes
from wan22.quantities import human_bytes
from wan_trt.console import tolerate_any_encoding
from wan_trt.extras import missing_module_line

USAGE: type[Any] = typer.BadParameter.__bases__[0]  # click's UsageError, of which Typer has a copy of its own


class CommandLine(typer.Typer):
    """A Typer that refuses what it cannot parse in one line, like all other bad input."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = str(self.info.name)
        if kwargs.get("standalone_mode") is False:  # called from Python, which wants the exceptions
            return super().__call__(*args, **kwargs)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: processes end, nothing is left
        try:
            code = super().__call__(*args, **kwargs | {"standalone_mode": False, "prog_name": program})
        except typer.Abort:  # a question that was not answered
            sys.exit(1)
        except Exception as error:
            if (line := _usage_line(error, program)) is None:
                raise
            if line:
                print(line, file=sys.stderr)
            sys.exit(2)
        sys.exit(code or 0)


def command_of(run: Callable[..., int | None], program: str) -> typer.Typer:
    """The command line of a program with one command, such as ``python -m studies.gpu``."""
    tolerate_any_encoding()
    app = CommandLine(pretty_exceptions_enable=False, add_completion=False)
    app.info.name = program
    app.command(program, context_settings={"help_option_names": ["-h", "--help"]})(guard(run, program))
    return app


def guard(run: Callable[..., int | None], program: str = "wan-trt") -> Callable[..., Any]:
    """Wrap ``run``: its result becomes the exit code, an expected failure one line of ``program``, Ctrl-C code 130."""

    @functools.wraps(run)
    def run_guarded(*args: Any, **kwargs: Any) -> None:
        try:
            code = run(*args, **kwargs)
        except UserError as error:
            print(f"{program}: {error}", file=sys.stderr)
            code = 2
        except MemoryError as error:
            print(f"{program}: {_out_of_memory(error)}", file=sys.stderr)
            code = 2
        except NonFiniteError as error:
            print(f"{program}: {error} | run wan-trt validate to find the cause", file=sys.stderr)
            code = 1
        except (OSError, ModuleNotFoundError) as error:
            if not (line := _error_line(error, run.__module__.rpartition(".")[2])):
                raise
            print(f"{program}: {line}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print(f"{program}: interrupted; no output is left incomplete", file=sys.stderr)
            code = 130
        raise typer.Exit(code or 0)

    return run_guarded


def _usage_line(error: Exception, program: str) -> str | None:
    """The line for arguments that do not parse; "" if the help was printed instead, None for another error."""
    if not isinstance(error, USAGE):
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    said = " ".join(error.format_message().split()).removesuffix(".")
    if (context := error.ctx) is None:  # the last word is an option without its value
        return f"{program}: {said} | expected a value after it | see --help"
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ")
    return f"{context.command_path}: {said} | expected {usage} | see {context.command_path} --help"


def _out_of_memory(error: MemoryError) -> str:
    """The line for a failed allocation; numpy's message contains the size."""
    size = f": {error}" if str(error) else ""
    available = human_bytes(available_host_bytes())
    return f"out of memory{size} | expected at most {available} | use a smaller --size or fewer --frames"


def _error_line(error: OSError | ModuleNotFoundError, command: str) -> str:
    """The line for a disk error or a missing extra; "" for a bug."""
    if isinstance(error, ModuleNotFoundError):
        return missing_module_line(error.name or "", command)
    return str(disk_error(error) or "")
