"""Locate the weights of an ONNX file from its bytes, so that bundles can be checked without ONNX.

A graph may name any file as its weights, and runtimes read whatever they can open. Only files listed in the bundle's
manifest, which are inside the bundle and have the stated hashes, may be read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from wan22.backends import runs_graphs
from wan22.bundle import Bundle
from wan22.component import Component
from wan22.errors import UserError

# Messages of onnx.proto that can contain a tensor: field number → message.
LEADS_TO: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
GRAPH, EXTERNAL_DATA, KEY, VALUE = 7, 13, 1, 2  # fields of model, tensor and entry
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
VARINT_BITS = 64
MOST_NESTED = 100  # levels of messages, protobuf's limit


class Stored(NamedTuple):
    """The location of a tensor."""

    location: str  # a file, relative to the graph's folder
    offset: int
    length: int  # 0 means to the end of the file


def stored_tensors(content: bytes) -> Iterator[Stored]:
    """Every tensor of the ONNX file ``content`` that is stored in another file.

    Raises:
        ValueError: ``content`` is not an ONNX model, or damaged.
    """
    model = memoryview(content)
    if GRAPH not in {number for number, _ in _fields(model)}:
        raise ValueError("no graph in it")
    yield from _in_message("model", model, 0)


def check_graphs(bundle: Bundle) -> None:
    """Refuse a bundle with an ONNX graph that reads a file missing from the manifest.

    Raises:
        UserError: a graph reads another file, or is not an ONNX model.
    """
    build = bundle.manifest.build
    if build is None or runs_graphs(build.backend):
        for component in bundle.manifest.components:
            check_component(bundle.folder, component)


def check_component(folder: Path, component: Component) -> None:
    """Run :func:`check_graphs` for one component of the bundle at ``folder``."""
    named = {file.path: file.size_bytes for file in component.weights}
    for file in (component.graph, *component.halves, *(stage.graph for stage in component.stages)):
        path = folder / file.path
        try:
            found = set(stored_tensors(path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}", "an ONNX graph", "export or build again") from None
        for location, offset, length in found:
            weights = (PurePosixPath(file.path).parent / location).as_posix()
            if weights not in named:
                expected = f"a file of its bundle: {', '.join(named) or 'it has none'}"
                raise UserError(f"{path} reads {location!r}", expected, "export or build again")
            if offset < 0 or length < 0 or offset + length > named[weights]:
                reads = f"{path} reads bytes {offset} to {offset + length} of {location}"
                raise UserError(reads, f"at most {named[weights]}", "export or build again")


def _in_message(kind: str, message: memoryview, depth: int) -> Iterator[Stored]:
    if depth > MOST_NESTED:
        raise ValueError("messages nested too deeply")
    if kind == "tensor":
        yield from _in_tensor(message)
        return
    for number, value in _fields(message):
        if inner := LEADS_TO[kind].get(number):
            yield from _in_message(inner, _bytes(value), depth + 1)


def _in_tensor(tensor: memoryview) -> Iterator[Stored]:
    entries = [dict(_fields(_bytes(value))) for number, value in _fields(tensor) if number == EXTERNAL_DATA]
    if not entries:
        return
    place = {_text(entry.get(KEY, b"")): _text(entry.get(VALUE, b"")) for entry in entries}
    yield Stored(place.get("location", ""), int(place.get("offset") or 0), int(place.get("length") or 0))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The number and value of every field of a protobuf message: its bytes, or 0 if the value is a number."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, at = _varint(message, at)
            yield number, 0
            continue
        if wire not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"wire type {wire}")
        size = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
        if wire == BYTES:
            size, at = _varint(message, at)
        if size > end - at:
            raise ValueError(f"a field of {size} bytes with {end - at} left")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < VARINT_BITS:
        if at >= len(message):
            raise ValueError("it ends in a number")
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: memoryview | int | bytes) -> str:
    return bytes(value).decode() if not isinstance(value, int) else ""
