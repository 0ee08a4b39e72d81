"""Read a request's body: JSON, multipart and URL-encoded forms give the same values, and the same errors.

The official client always sends multipart forms, in which everything is text and objects have bracketed names.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from gateway.api_error import ApiError, invalid
from gateway.fields import BY_NAME, MERGED, Field, nearest
from gateway.forms import Part, form_parts

BRACKETED = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
MAX_DEPTH = 8  # of a bracketed name
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?")
MAX_DIGITS = 40


def read_body(content_type: str, body: bytes) -> dict[str, Any]:
    """The values of a request by canonical name; images are ``bytes`` or ``{"image_url": ...}``.

    Raises:
        ApiError: another content type, a body that cannot be parsed, an unknown field, a value of the wrong type.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return canonical(_form(form_parts(kind, content_type, body)))
    if kind in ("application/json", ""):
        return canonical(_json(body))
    raise ApiError(415, "unsupported_media_type", f"a body of {kind[:80]} | expected JSON or multipart/form-data")


def _json(content: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise invalid(twice[:80], f"{twice[:80]} twice | expected it once", "duplicate_field")
        return members

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(content, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # ValueError covers text that is not UTF-8
        raise invalid(None, f"the body is not JSON: {str(error)[:120]}", "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(None, "the body is not a JSON object | expected {...}", "invalid_json")
    return value


def _form(parts: list[Part]) -> dict[str, Any]:
    """The fields of a form, with bracketed names put together."""
    given: dict[str, Any] = {}
    for name, value in parts:
        _put(given, name, value)
    return given


def _put(given: dict[str, Any], name: str, value: Any) -> None:
    """Store ``a[b]`` as ``{"a": {"b": value}}`` and ``a[]`` as a list."""
    match = BRACKETED.fullmatch(name)
    path = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])] if match else [name]
    if len(path) > MAX_DEPTH:
        raise invalid(name[:80], "brackets nested too deep", "invalid_form")
    at: Any = given
    for here, following in zip(path, [*path[1:], None], strict=True):
        last = following is None
        if isinstance(at, list):
            if here or not last:
                raise invalid(name[:80], f"{name[:80]} | expected a list of objects as one JSON text", "invalid_form")
            at.append(value)
        elif not isinstance(at, dict) or (last and here in at):
            raise invalid(path[0][:80], f"{name[:80]} twice | expected it once", "duplicate_field")
        elif last:
            at[here] = value
        else:
            at = at.setdefault(here, [] if following == "" else {})


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values by canonical name, each of its type. A field that is null counts as missing.

    Raises:
        ApiError: see :func:`read_body`.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in _merged(given):
        field = BY_NAME.get(name)
        if field is None:
            near = nearest(name)
            hint = f"did you mean {near}?" if near else "see /openapi.json for the known ones"
            raise invalid(name[:80], f"unknown field {name[:80]!r} | {hint}", "unknown_field")
        if field.name in said:
            found = name if said[field.name] == name else f"{said[field.name]} and {name}"
            raise invalid(name, f"{found} given together | expected {field.name} once", "duplicate_field")
        said[field.name] = name
        if value is not None:
            values[field.name] = _typed(field, name, value)
    return values


def _merged(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The members of the request and of its ``extra_body`` and ``extra_params``."""
    pairs = []
    for name, value in given.items():
        if name in MERGED:
            inner = _object(name, value)
            if nested := next((key for key in inner if key in MERGED), None):
                raise invalid(name, f"{nested} inside {name} | expected fields of a request")
            pairs += list(inner.items())
        elif value is not None:
            pairs.append((name, value))
    return pairs


def _object(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json_in(name, value)
    if not isinstance(value, dict):
        raise invalid(name, f"{name} | expected an object, or one as JSON text")
    return value


def _json_in(name: str, text: str) -> Any:
    try:
        return _json(text.encode())
    except (ApiError, UnicodeEncodeError):
        raise invalid(name, f"{name} | expected an object, or one as JSON text") from None


def _typed(field: Field, name: str, value: Any) -> Any:
    """``value`` as the field's type. Numbers and booleans may be text, as forms have them."""
    if field.kind == "image":
        if isinstance(value, str) and value[:5].lower() == "data:":
            return {"image_url": value}
        return value if isinstance(value, bytes) else _object(name, value)
    if isinstance(value, bytes):
        raise invalid(name, f"{name} is a file | expected text", "invalid_type")
    if field.kind == "list" and isinstance(value, list):
        value = ",".join(str(each) if type(each) in (int, str) else "?" for each in value)
    if field.kind == "names":
        return _names(name, value)
    if field.kind in ("int", "number"):
        return _number(field, name, value)
    if field.kind == "bool":
        words = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
        raise invalid(name, f"{name} {str(value)[:40]!r} | expected true or false", "invalid_type")
    return _text(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, f"{name} | expected text", "invalid_type")
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in value):
        raise invalid(name, f"{name} | expected text that UTF-8 can hold, without NUL", "invalid_encoding")
    return value


def _names(name: str, value: Any) -> list[str]:
    """A list of texts, or one text with commas."""
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in given):
        shown = json.dumps(value, default=lambda _: "a file")[:40]
        raise invalid(name, f"{name} {shown} | expected a look, or a list of looks and terms", "invalid_type")
    return [part.strip() for each in given for part in _text(name, each).split(",") if part.strip()]


def _number(field: Field, name: str, value: Any) -> int | float:
    shown = str(value)[:MAX_DIGITS]
    wrong = invalid(
        name, f"{name} {shown!r} | expected {'a whole' if field.kind == 'int' else 'a'} number", "invalid_type"
    )
    if isinstance(value, str) and len(value.strip()) <= MAX_DIGITS and NUMBER.fullmatch(value.strip()):
        text = value.strip()
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    if not abs(value) < 2**63:  # NaN is not, either
        raise wrong
    if field.kind == "int":
        if value != int(value):
            raise wrong
        return int(value)
    return value if abs(value) < 1e12 else _refuse(wrong)


def _refuse(error: ApiError) -> float:
    raise error
