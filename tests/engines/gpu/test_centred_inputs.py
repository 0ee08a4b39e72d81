"""Centred inputs cost no kernel: the subtraction is fused into the quantisation that follows it."""

from dataclasses import replace

from export.quantise.input_means import CENTRED, input_width
from tests.engines import conftest
from wan22.specs import SPECS, Precision


def test_a_block_with_centred_inputs_has_no_more_kernels(compiled, monkeypatch):
    model, target, precision = "t2v-a14b-tiny", "rtx4090", Precision.FP8_ATTN
    dit = SPECS[model].dit
    plain = compiled(model, target, precision)
    linears = [f"blocks.{layer}.{kind}" for layer in range(dit.layers) for kind in CENTRED]
    centred = replace(conftest.FP8_OF[precision], centred={name: input_width(dit, name) for name in linears})
    monkeypatch.setitem(conftest.FP8_OF, precision, centred)
    found = compiled(model, target, precision)
    assert found.problems == []
    assert len(found.typical_block) == len(plain.typical_block)
