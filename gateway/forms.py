"""Take apart the bodies of forms, strictly: one that is cut off or is not UTF-8 is refused, not guessed."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.api_error import ApiError, invalid

Part = tuple[str, str | bytes]  # name; text, or the content of a file
MAX_PARTS = 100


def form_parts(kind: str, content_type: str, body: bytes) -> list[Part]:
    """The parts of a form in their order. The names of files are ignored.

    Raises:
        ApiError: it is cut off, damaged, has too many parts, or text that is not UTF-8.
    """
    if kind == "application/x-www-form-urlencoded":
        try:
            text = body.decode("ascii")
            return list(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARTS))
        except ValueError:
            raise _damaged("URL-encoded text in UTF-8") from None
    _, options = parse_options_header(content_type)
    reader = _Reader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())
        parser.write(body)
        parser.finalize()
    except KeyError:
        raise _damaged("a content type with a boundary") from None
    except (FormParserError, ValueError):
        raise _damaged("parts between boundaries, text in UTF-8") from None
    if not reader.ended:
        raise _damaged("a closing boundary; it is cut off")
    return reader.parts


def _damaged(expected: str) -> ApiError:
    return invalid(None, f"the form cannot be read | expected {expected}", "invalid_form")


@dataclass
class _Reader:
    """Collects parts from the parser's callbacks."""

    parts: list[Part] = field(default_factory=list)
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _data: bytearray = field(default_factory=bytearray)

    def callbacks(self) -> Any:
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._headers, self._data = {}, bytearray()
        if len(self.parts) == MAX_PARTS:
            raise ValueError("too many parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode()  # UnicodeDecodeError is a ValueError
        if not name:
            raise ValueError("a part without a name")
        is_file = b"filename" in options
        self.parts.append((name, bytes(self._data) if is_file else self._data.decode()))

    def _end(self) -> None:
        self.ended = True
