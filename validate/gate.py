"""Gates: thresholds in a TOML file that decide whether a bundle may go out. One reader for every command that measures.

A file has one table per command and, inside it, the name of a measurement with ``min``, ``max`` or both::

    [bench]
    high_noise.speedup.min = 1.3
    vae_decoder.memory_ratio.max = 0.5

A command reads its own table and checks that every name in it is one that it can measure, before it does any work. A
gate on something that this run did not measure is not passed.
"""

import difflib
import math
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from wan22.errors import UserError

TABLES = ("bench", "validate")  # the commands that have gates
BOUNDS = ("min", "max")
Bound = Literal["min", "max"]
DIGITS = 17  # that tell all numbers apart


def marked(passed: object, text: str = "") -> Text:
    """``text`` with a mark for a terminal: green where the check ``passed``, else red."""
    mark = Text("✓", "green") if passed else Text("✗", "red")
    return mark if not text else Text.assemble(mark, " ", text)


@dataclass(frozen=True)
class Gate:
    """``measurement`` must not be below (``min``) or above (``max``) ``limit``."""

    measurement: str  # "high_noise.speedup"
    bound: Bound
    limit: float

    def judge(self, measured: Mapping[str, float]) -> "Verdict":
        return Verdict(self, measured.get(self.measurement))


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    found: float | None  # None: not measured in this run
    where: str = ""  # "case 3", where one of several is to blame

    def __bool__(self) -> bool:
        if self.found is None or math.isnan(self.found):
            return False
        return self.found >= self.gate.limit if self.gate.bound == "min" else self.found <= self.gate.limit

    def __str__(self) -> str:
        sign = "≥" if self.gate.bound == "min" else "≤"
        return f"{self.gate.measurement} {self.found_in_words}, {sign} {self.gate.limit:g}"

    @property
    def found_in_words(self) -> str:
        found = "not measured" if self.found is None else apart(self.found, self.gate.limit, _significant)
        return f"{found} in {self.where}" if self.where else found

    def as_json(self) -> dict[str, Any]:
        return vars(self.gate) | {"found": self.found, "passed": bool(self)}


def apart(value: float, limit: float, write: Callable[[float, int], str]) -> str:
    """``value`` as text, with as many more digits as it takes to look different from a ``limit`` that it is not.

    Args:
        value: what was found.
        limit: what it is held to.
        write: a number and how many digits more than usual → its text.
    """
    more = 0
    while value != limit and write(value, more) == write(limit, more) and more < DIGITS:
        more += 1
    return write(value, more)


def _significant(value: float, more: int) -> str:
    return f"{value:.{4 + more}g}"


def read_gates(path: Path, table: str, known: Collection[str]) -> tuple[Gate, ...]:
    """The gates of ``[table]`` in the file at ``path``, in its order.

    Args:
        path: TOML as the module's docstring shows it.
        table: one of ``TABLES``.
        known: the measurements that the asking command can make.

    Raises:
        UserError: no such file, no TOML, an unknown table or name, something that is no bound, no gate at all.
    """
    content = _content(path)
    for name in content:
        if name not in TABLES:
            raise _unknown(path, name, TABLES)
    gates = tuple(_gates(path, content.get(table, {}), table))
    for gate in gates:
        if gate.measurement not in known:
            raise _unknown(path, f"{table}.{gate.measurement}", [f"{table}.{name}" for name in known])
    if not gates:
        raise UserError(f"{path} has no gate in [{table}]", "at least one", f"write one, or leave --gate {path} out")
    return gates


def has_table(path: Path, table: str) -> bool:
    """Whether the file speaks about that command at all."""
    return table in _content(path)


def judge(gates: Collection[Gate], measured: Mapping[str, float]) -> tuple[Verdict, ...]:
    return tuple(gate.judge(measured) for gate in gates)


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"gate file {path}: {error.strerror}", "a file of thresholds", "name another") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"gate file {path}: {error}", "TOML", "mend the file") from None


def _gates(path: Path, value: Any, name: str) -> Iterator[Gate]:
    """The gates below the key ``name``, whose first part is the table."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: {name} = {value!r}",
            "a measurement with min or max",
            f"write {name}.min = ... or {name}.max = ...",
        )
    for key, inner in value.items():
        if key in BOUNDS and not isinstance(inner, dict):
            yield Gate(name.partition(".")[2], key, _limit(path, f"{name}.{key}", inner))
        else:
            yield from _gates(path, inner, f"{name}.{key}")


def _limit(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {name} = {value!r}", "a finite number", "write one")
    return float(value)


def _unknown(path: Path, name: str, known: Collection[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    told = f"one like {', '.join(near)}" if near else f"one of {', '.join(sorted(known))}"
    return UserError(f"{path}: unknown key {name}", told, "correct the key")
