"""Reads the JSON of an earlier bench from a file of it, or from captured output that ends with it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from validate.bench.result import FORMAT
from wan22.errors import UserError

FIELDS = {
    "model": str,
    "precision": str,
    "machine": dict,
    "conditions": dict,
    "pieces": dict,
    "measurements": dict,
    "faults": list,
    **dict.fromkeys(("width", "height", "frames", "tokens"), int),
}
LARGEST = sys.float_info.max
REMEDY = "name the output of an earlier wan-trt bench"


def read_bench(path: Path, what: str = "bench") -> dict[str, Any]:
    """Read the output of ``BenchReport.as_json``. Errors call the file ``what``.

    Raises:
        UserError: the file is missing, is not a bench, or cannot be used in a report or comparison.
    """
    try:
        content = _content(path.read_text(encoding="utf-8-sig").strip())
        json.dumps(
            content, ensure_ascii=False
        ).encode()  # JSON can escape characters that UTF-8, and so a report, cannot encode
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}", "the JSON of a bench", REMEDY) from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} {path}: its last line is not JSON", "the JSON of a bench", REMEDY) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{what} {path}: format {found!r}", FORMAT, REMEDY)
    for field, kind in FIELDS.items():
        if not isinstance(content.get(field), kind):
            raise UserError(f"{what} {path}: {field} {content.get(field)!r}", f"a {kind.__name__}", REMEDY)
    for name, value in _numbers(content):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise UserError(f"{what} {path}: {name} {value!r:.40}", "a finite number", REMEDY)
    for fault in content["faults"]:
        if not isinstance(fault, str):
            raise UserError(f"{what} {path}: fault {fault!r}", "some text", REMEDY)
    return content


def _content(text: str) -> Any:
    """Parse the whole text, which may be indented, or else its last line."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.rpartition("\n")[2])


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers that later calculations use, by name."""
    yield from content["measurements"].items()
    load = content["conditions"].get("load_average", [0.0])
    yield "load_average", load[0] if isinstance(load, list) and load else None
    yield "cores", content["machine"].get("cores", 1)
