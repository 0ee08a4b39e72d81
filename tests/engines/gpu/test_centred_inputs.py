"""Means and factors cost no kernel: they are fused into the quantisation that follows them."""

from export.graphs.linear import Quantised
from tests.engines import conftest
from wan22.precision import Precision


def test_a_block_with_measured_inputs_has_no_more_kernels(compiled, monkeypatch):
    model, target, precision = "t2v-a14b-tiny", "rtx4090", Precision.INT8_FP8_ATTN
    measured = compiled(model, target, precision)
    linears = conftest.QUANTISED[precision].linears
    monkeypatch.setitem(conftest.QUANTISED, precision, Quantised(True, True, linears))
    plain = compiled(model, target, precision)
    assert measured.problems == []
    assert len(measured.typical_block) == len(plain.typical_block)
