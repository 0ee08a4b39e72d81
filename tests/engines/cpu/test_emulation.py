"""A CPU reproduces a bfloat16 graph: float32 arithmetic, rounded where the graph stores 16 bits."""

from dataclasses import replace
from math import erf

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from engines.cpu.emulation import emulate
from export.checkpoint.schema import dit_tensors
from export.graphs.builder import BFLOAT16, FLOAT, FLOAT16, GraphBuilder
from export.graphs.dit import dit_graph
from export.graphs.linear import FLOAT8, coded_matrices
from export.precisions import usual_quantised
from export.quantise.quantised_weights import QuantisedWeights
from studies.precision.session import fill, open_graph
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.precision import Precision
from wan22.specs import SPECS

SPEC = SPECS["t2v-a14b-tiny"].dit


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture
def product():
    """``x [2, 64]`` in bfloat16 times a weight, through GELU."""
    g = GraphBuilder("product")
    x = g.input("x", FLOAT, [2, 64])
    y = g.op("Gelu", g.op("Gemm", g.cast(x, BFLOAT16), g.weight("w", (8, 64), BFLOAT16), transB=1))
    g.output("y", g.cast(y, FLOAT), [2, 8])
    return g


def test_operands_and_results_are_rounded_and_sums_are_not(product):
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape, dtype=np.float32) for shape in ((2, 64), (8, 64)))
    model = fill(product, {"w": w}.__getitem__)
    emulate(model)
    found = open_graph(model)(x=x)[0]
    sums = rounded(rounded(x) @ rounded(w).T)
    expected = rounded(np.vectorize(lambda v: v * (1 + erf(v / 2**0.5)) / 2)(sums).astype(np.float32))
    assert np.abs(found - expected).max() <= np.abs(expected).max() * 2**-8  # a last bit, where erf differs
    assert (found == rounded(found)).all()


def test_logits_and_what_fp8_reads_stay_in_full():
    g = GraphBuilder("attention")
    q, k = (g.cast(g.input(n, FLOAT, [4, 4]), BFLOAT16) for n in "qk")
    p = g.op("Softmax", g.op("MatMul", q, k), axis=-1)
    eight = g.op("QuantizeLinear", p, g.constant(1 / 448, FLOAT), output_dtype=int(FLOAT8))
    back = g.op("DequantizeLinear", eight, g.constant(1 / 448, FLOAT), output_dtype=int(BFLOAT16))
    back.type = ir.TensorType(BFLOAT16)
    g.output("y", g.cast(back, FLOAT), [4, 4])
    model = fill(g, {}.__getitem__)
    emulate(model)
    casts = [node for node in model.graph if node.name and node.name.endswith("/rounded")]
    assert [node.inputs[0].producer().op_type for node in casts] == ["Cast", "Cast"]  # q and k alone


@pytest.mark.parametrize("emulated", [BFLOAT16, FLOAT16])
def test_a_transformer_errs_as_its_mantissa_says(emulated):
    weights, inputs = made_up(dit_tensors(SPEC)), inputs_for(SPEC, 3, 8, 8, [900.0])
    exact = open_graph(fill(dit_graph(SPEC), weights.__getitem__))(**inputs)[0]
    model = fill(dit_graph(SPEC, emulated), weights.__getitem__)
    emulate(model, emulated)
    unit = {BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}[emulated]
    assert 0.2 * unit < relative_l2(open_graph(model)(**inputs)[0], exact) < 3 * unit


@pytest.mark.parametrize("precision", [Precision.FP8_ATTN, Precision.INT8], ids=str)
def test_exported_quantised_graphs_run(precision):
    weights, inputs = made_up(dit_tensors(SPEC)), inputs_for(SPEC, 1, 8, 8, [900.0])
    g = dit_graph(SPEC, BFLOAT16, None, usual_quantised(precision))
    model = fill(g, QuantisedWeights(weights.__getitem__, SPEC, coded_matrices(g)))
    emulate(model)
    assert not [v for node in model.graph for v in node.outputs if v.dtype == BFLOAT16 and "/16" not in v.name]
    exact = open_graph(fill(dit_graph(SPEC), weights.__getitem__))(**inputs)[0]
    assert 0.003 < relative_l2(open_graph(model)(**inputs)[0], exact) < 0.05


def test_a_branch_beside_nvfp4_takes_a_part_of_its_error():
    weights, inputs = made_up(dit_tensors(SPEC)), inputs_for(SPEC, 1, 8, 8, [900.0])
    exact = open_graph(fill(dit_graph(SPEC), weights.__getitem__))(**inputs)[0]
    errors = []
    for rank in (0, 32, 96):
        g = dit_graph(SPEC, BFLOAT16, None, replace(usual_quantised(Precision.NVFP4), low_rank=rank))
        read = QuantisedWeights(weights.__getitem__, SPEC, coded_matrices(g), low_rank=rank)
        model = fill(g, read)
        emulate(model)
        assert not [v for node in model.graph for v in node.outputs if v.dtype == BFLOAT16 and "/16" not in v.name]
        errors.append(relative_l2(open_graph(model)(**inputs)[0], exact))
    assert errors[2] < 0.9 * errors[1] < 0.85 * errors[0] < 0.2, errors
