"""A builder receives weights through pointers, and the pages it has read do not stay in memory."""

import ctypes
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from engines.gpu.mapped_weights import MappedWeights
from export.graphs.builder import BFLOAT16, FLOAT, GraphBuilder, Placed


class Reader:
    """The two methods of an ONNX parser; it reads each tensor immediately."""

    def __init__(self):
        self.read = {}

    def load_initializer(self, name, pointer, size_bytes):
        self.read[name] = ctypes.string_at(pointer, size_bytes)
        return True


def resident_file_bytes():
    return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.fixture
def graph(tmp_path):
    """32 MiB of weights in two files, one at an offset that is not page-aligned."""
    g, values = GraphBuilder("g"), np.arange(2**23, dtype=np.uint32)
    x = g.input("x", FLOAT, [2**21])
    for key, dtype in (("a", FLOAT), ("b", BFLOAT16), ("c", FLOAT)):
        x = g.add(x, g.cast(g.weight(key, (2**21,), dtype), FLOAT))
    g.output("y", x, [2**21])
    values.tofile(tmp_path / "one.bin")
    values[::-1].tofile(tmp_path / "two.bin")
    g.bind(
        {"a": Placed("one.bin", 8, 2**23), "b": Placed("two.bin", 70, 2**22), "c": Placed("one.bin", 2**24, 2**23)},
        tmp_path,
    )
    g.save(tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_a_parser_reads_every_stored_tensor_where_it_lies(graph):
    reader = Reader()
    assert MappedWeights(graph).load_into(reader)
    stored = {name: value.const_value for name, value in ir.load(graph).graph.initializers.items()}
    expected = {name: tensor.tobytes() for name, tensor in stored.items() if isinstance(tensor, ir.ExternalTensor)}
    assert reader.read == expected
    assert len(expected) == 3


def test_what_was_read_is_let_go_of_and_can_be_read_again(graph):
    weights, reader, again = MappedWeights(graph), Reader(), Reader()
    weights.load_into(reader)
    read = resident_file_bytes()
    weights.drop_pages()
    assert resident_file_bytes() < read - 2**24
    weights.load_into(again)
    assert again.read == reader.read
