"""Weights are streamed into safetensors files that ONNX addresses by offset."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder
from export.graphs.weights_file import convert, declare_weights, placements, write_weights
from wan22.errors import UserError

SOURCE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.0, 1.00390625], np.float32)}


def pieces(key):
    return [SOURCE[key]]


def graph(a=FLOAT, b=FLOAT16):
    g = GraphBuilder("g")
    g.weight("a", (2, 3), a)
    g.weight("b", (2,), b)
    return g


def test_the_file_is_safetensors_and_its_hash_is_returned(tmp_path):
    told = []
    entry = write_weights(
        tmp_path / "w.safetensors", declare_weights([graph()]), pieces, lambda *args: told.append(args)
    )
    loaded = load_file(tmp_path / "w.safetensors")
    assert (loaded["a"] == SOURCE["a"]).all()
    assert loaded["b"].dtype == np.float16
    assert entry.sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert told == [("a", 24), ("b", 4)]


def test_placements_find_the_bytes(tmp_path):
    weights = declare_weights([graph()])
    write_weights(tmp_path / "w.safetensors", weights, pieces)
    data, placed = (tmp_path / "w.safetensors").read_bytes(), placements("w.safetensors", weights)
    where = placed["a"]
    assert where.offset % 4096 == 0
    assert data[where.offset : where.offset + where.length] == SOURCE["a"].tobytes()
    assert placed["b"].offset + placed["b"].length == len(data)


def test_graphs_of_one_file_must_agree():
    with pytest.raises(ValueError, match="graphs disagree"):
        declare_weights([graph(), graph(a=FLOAT16)])


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert convert("w", values, BFLOAT16.numpy()).astype(np.float32).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_no_number_is_named(bad, dtype):
    values = np.ones(100, dtype)
    values[50] = bad
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0\.weight holds NaN or infinity"):
        convert("blocks.0.ffn.0.weight", values, FLOAT.numpy())


def test_a_value_beyond_float16_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="use --precision bf16"):
        convert("w", np.array([7e4], np.float32), FLOAT16.numpy())
