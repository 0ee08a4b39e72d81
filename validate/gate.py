"""Gates: thresholds in a TOML file that decide whether a bundle may be released.

A file has one table per command. Inside, each measurement has ``min``, ``max`` or both::

    [bench]
    high_noise.speedup.min = 1.3
    vae_decoder.memory_ratio.max = 0.5

A command reads its own table and, before any work, checks that it can measure every name in it. A gate fails if the run
did not measure its value.
"""

import difflib
import math
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from wan22.errors import UserError
from wan22.inputs import check_regular

TABLES = ("bench", "validate")  # the commands that support gates
BOUNDS = ("min", "max")
Bound = Literal["min", "max"]
DIGITS = 17  # enough to distinguish any two float64
MAX_DOTS = 20  # more than any name has
LARGEST = sys.float_info.max


def check_mark(passed: object, text: str = "") -> Text:
    """``text`` after a mark for the terminal: a green tick if the check ``passed``, else a red cross."""
    mark = Text("✓", "green") if passed else Text("✗", "red")
    return mark if not text else Text.assemble(mark, " ", text)


@dataclass(frozen=True)
class Gate:
    """``measurement`` must not be below (``min``) or above (``max``) ``limit``."""

    measurement: str  # "high_noise.speedup"
    bound: Bound
    limit: float


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    found: float | None  # None: not measured in this run
    where: str = ""  # the case with the worst value, such as "case 3"

    def __bool__(self) -> bool:
        if self.found is None or math.isnan(self.found):
            return False
        return self.found >= self.gate.limit if self.gate.bound == "min" else self.found <= self.gate.limit

    def __str__(self) -> str:
        sign = "≥" if self.gate.bound == "min" else "≤"
        return f"{self.gate.measurement} {self.found_in_words}, {sign} {self.gate.limit:g}"

    @property
    def found_in_words(self) -> str:
        found = "not measured"
        if self.found is not None:
            found = distinct_text(self.found, self.gate.limit, lambda value, more: f"{value:.{4 + more}g}")
        return f"{found} in {self.where}" if self.where else found

    def as_json(self) -> dict[str, Any]:
        return vars(self.gate) | {"found": self.found, "passed": bool(self)}


def distinct_text(value: float, limit: float, write: Callable[[float, int], str]) -> str:
    """``value`` as text, with enough digits to differ from the text of ``limit`` unless both are equal.

    Args:
        value: the measured value.
        limit: its limit.
        write: formats a number; the second argument is the number of additional digits.
    """
    more = 0
    while value != limit and write(value, more) == write(limit, more) and more < DIGITS:
        more += 1
    return write(value, more)


def read_gates(path: Path, table: str, known: Collection[str]) -> tuple[Gate, ...]:
    """The gates of ``[table]`` in the file at ``path``, in its order.

    Args:
        path: TOML as the module's docstring shows it.
        table: one of ``TABLES``.
        known: the measurements that the command can make.

    Raises:
        UserError: the file is missing, is not TOML, has no gates, or has an unknown table, name or bound.
    """
    content = _content(path)
    for name in content:
        if name not in TABLES:
            raise _unknown_key(path, name, TABLES)
    gates = tuple(_gates(path, content.get(table, {}), table))
    for gate in gates:
        if gate.measurement not in known:
            raise _unknown_key(path, f"{table}.{gate.measurement}", [f"{table}.{name}" for name in known])
    if not gates:
        raise UserError(f"{path} has no gate in [{table}]", "at least one gate", f"add one, or omit --gate {path}")
    return gates


def has_table(path: Path, table: str) -> bool:
    """True if the file has a table for that command."""
    return table in _content(path)


def judge(gates: Collection[Gate], measured: Mapping[str, float]) -> tuple[Verdict, ...]:
    return tuple(Verdict(gate, measured.get(gate.measurement)) for gate in gates)


def _content(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"gate file {path}: {error.strerror}", "a readable TOML file", "name another file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"gate file {path}: {error}", "valid TOML", "fix the file") from None


def _gates(path: Path, value: Any, name: str) -> Iterator[Gate]:
    """Yield the gates below the key ``name``, which starts with the table."""
    if name.count(".") > MAX_DOTS:
        raise UserError(f"{path}: {name:.60}...", "the name of a measurement", "correct the key")
    if not isinstance(value, dict):
        remedy = f"write {name}.min = ... or {name}.max = ..."
        raise UserError(f"{path}: {name} = {_shown(value)}", "a measurement with min or max", remedy)
    for key, inner in value.items():
        if key in BOUNDS and not isinstance(inner, dict):
            if isinstance(inner, bool) or not isinstance(inner, int | float) or not -LARGEST <= inner <= LARGEST:
                raise UserError(f"{path}: {name}.{key} = {_shown(inner)}", "a finite number", "correct the value")
            yield Gate(name.partition(".")[2], key, float(inner))
        else:
            yield from _gates(path, inner, f"{name}.{key}")


def _shown(value: Any) -> str:
    """The first characters of ``value``. Python does not print integers of thousands of digits; TOML may have them."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number of thousands of digits"


def _unknown_key(path: Path, name: str, known: Collection[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    expected = f"one like {', '.join(near)}" if near else f"one of {', '.join(sorted(known))}"
    return UserError(f"{path}: unknown key {name}", expected, "correct the key")
