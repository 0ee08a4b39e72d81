"""The JSON of an earlier bench: a file of it, or a captured output whose last line it is."""

import json
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
}


def read_bench(path: Path, what: str = "bench") -> dict[str, Any]:
    """What ``BenchReport.as_json`` gave. Errors call the file ``what``.

    Raises:
        UserError: no such file, or no bench in it.
    """
    remedy = "name the output of an earlier wan-trt bench"
    try:
        content = json.loads(path.read_text(encoding="utf-8").strip().rpartition("\n")[2])
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}", "the JSON of a bench", remedy) from None
    except ValueError:
        raise UserError(f"{what} {path}: its last line is no JSON", "the JSON of a bench", remedy) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{what} {path}: format {found!r}", FORMAT, remedy)
    for field, kind in FIELDS.items():
        if not isinstance(content.get(field), kind):
            raise UserError(f"{what} {path}: {field} {content.get(field)!r}", f"a {kind.__name__}", remedy)
    return content
