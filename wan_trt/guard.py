"""Exit codes of every command, and one line for every expected failure.

0: success. 1: a check failed, or a model computed NaN. 2: bad input, or the machine lacks a resource. 130: interrupted
by Ctrl-C or SIGTERM. A bug keeps its traceback.
"""

import functools
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import typer

from wan22.errors import NonFiniteError, UserError, disk_error, shortened
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
    kind, context = type(error).__name__, error.ctx
    if kind == "NoArgsIsHelpError":
        return ""
    path = program if context is None else context.command_path
    usage = "" if context is None else context.get_usage().removeprefix("Usage: ")
    said, remedy = error.format_message().removesuffix("."), f"see {path} --help"
    found, expected = said, usage
    if kind == "NoSuchOption":
        known = [name for param in context.command.params if not getattr(param, "hidden", False) for name in param.opts]
        found, expected = f"no option {shortened(error.option_name)}", _nearest(error.option_name, known) or usage
    elif (named := re.match(r"No such command '(.*?)'", said)) is not None:
        known = context.command.list_commands(context)
        found, expected = f"no command {shortened(named[1])}", _nearest(named[1], known) or ", ".join(known)
    elif kind == "BadOptionUsage":  # the parser does not say of which command
        none = "requires" in said
        found = f"{error.option_name} {'without' if none else 'with'} a value"
        expected, remedy = ("a value after it", "see --help") if none else (error.option_name, "leave the value out")
    elif kind == "MissingParameter":
        found = f"no {' or '.join(error.param.opts)}"
    elif kind == "BadParameter" and hasattr(error.__cause__, "errors"):
        typed, wanted = error.__cause__.errors()[0]["input"], _wanted(error.param, error.__cause__)
        found, expected = f"{error.param.opts[-1]} {shortened(str(typed))}", wanted or said
    elif (extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", said, re.DOTALL)) is not None:
        found = f"{shortened(extra[1])} after the last argument"
    return " ".join(f"{path}: {found} | expected {expected} | {remedy}".split())


def _nearest(typed: str, known: Sequence[str]) -> str:
    """The names that ``typed`` begins or nearly is; "" without one."""
    begun = [name for name in known if len(typed) > 3 and name.startswith(typed)]
    return _any_of((begun or get_close_matches(typed, known, 3, 0.7))[:3])


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _wanted(param: Any, error: Any) -> str:
    """What an option takes whose value is pydantic's ``error``; "" where this is not known."""
    (wrong, *_) = error.errors()
    if wrong["type"] == "value_error":
        _, _, choices = wrong["msg"].removesuffix(".").partition(" is not one of ")
        return _any_of([choice.strip("'") for choice in choices.split(", ")])
    number = {"int": "a whole number", "float": "a number"}.get(error.title.removeprefix("constrained-"), "")
    least, most = param.min, param.max
    bounds = f" of at least {least:g}" if least is not None else ""
    bounds += f"{' and' if bounds else ' of'} at most {most:g}" if most is not None else ""
    return f"{number}{bounds}" if number else ""


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
