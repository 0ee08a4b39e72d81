"""Per-token computations run chunk by chunk, and the velocity is the same."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from engines.cpu import chunks
from engines.cpu.chunks import chunk_tokens
from engines.cpu.passes import fit_transformer
from tests.engines.cpu.graphs import GRID, inputs, kinds, run, transformer
from wan22.specs import SPECS

SPEC = replace(SPECS["t2v-a14b-tiny"].dit, layers=2)
TOKENS = 48  # of GRID


@pytest.fixture
def whole():
    """A fitted transformer before it is chunked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.cpu.passes.chunk_tokens", lambda model, width: 0)
        model = transformer(SPEC)
        fit_transformer(model, SPEC)
    return model


@pytest.mark.parametrize(("fewest", "most"), [(1, 16), (5, 47), (48, 100), (25, 47), (100, 200)])
def test_chunks_that_divide_the_tokens_and_those_that_cannot_compute_the_same(whole, monkeypatch, fewest, most):
    expected = run(whole, inputs(SPEC))
    monkeypatch.setattr(chunks, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * SPEC.width * most)
    assert np.prod(GRID) == TOKENS
    assert chunk_tokens(whole, SPEC.width) == SPEC.layers + 1
    assert np.abs(run(whole, inputs(SPEC)) - expected).max() < 2e-6 * np.abs(expected).max()


def test_only_self_attention_sees_all_tokens_at_once(whole):
    chunk_tokens(whole, SPEC.width)
    outside = [node.op_type for node in whole.graph]
    assert outside.count("MultiHeadAttention") == SPEC.layers
    assert kinds(whole).count("MultiHeadAttention") == 2 * SPEC.layers
    assert outside.count("FastGelu") == 1  # of the text
    assert "RotaryEmbedding" not in outside


def test_weights_stay_in_the_graph_outside(whole):
    before = set(whole.graph.initializers)
    chunk_tokens(whole, SPEC.width)
    assert before <= set(whole.graph.initializers)
    assert not [graph.name for graph in whole.graph.subgraphs() if graph.initializers]


def after(node, op_type):
    made_by = node.inputs[0].producer()
    return made_by is not None and made_by.op_type == op_type


def test_rows_that_chunks_only_reshape_may_be_read_elsewhere_too(whole):
    read = next(n for n in whole.graph if n.op_type == "Reshape" and after(n, "MultiHeadAttention"))
    elsewhere = ir.node("ReduceMax", [read.outputs[0]], {"keepdims": 0})
    elsewhere.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    whole.graph.append(elsewhere)
    whole.graph.outputs.insert(0, elsewhere.outputs[0])
    expected = run(whole, inputs(SPEC))
    chunk_tokens(whole, SPEC.width)
    assert run(whole, inputs(SPEC)) == expected
