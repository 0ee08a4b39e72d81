"""Graphs without a precaution have larger errors, and FP8 in some places has smaller ones than in all."""

import pytest

from export.checkpoint.schema import dit_tensors
from export.graphs.builder import FLOAT
from export.graphs.dit import dit_graph
from export.graphs.linear import Quantised, coded_matrices
from export.precisions import LINEARS
from export.quantise.quantised_weights import QuantisedWeights
from studies.precision.ablation import keep_k_mean, scale_v_per_tensor, subtract_token_means
from studies.precision.session import fill, open_graph
from tests.export.conftest import made_up
from tests.export.graphs.test_dit import inputs_for, relative_l2
from wan22.precision import Number
from wan22.specs import SPECS

SPEC = SPECS["t2v-a14b-tiny"].dit
BOTH = Quantised(self_attention=True, cross_attention=True)
WIDE = dict.fromkeys(LINEARS, Number.BF16)
PATCHES = (keep_k_mean, scale_v_per_tensor, subtract_token_means)


@pytest.fixture(scope="module")
def weights():
    made = made_up(dit_tensors(SPEC))
    for layer in range(SPEC.layers):  # channels of K and V that are large for every token
        made[f"blocks.{layer}.self_attn.norm_k.weight"][[3, 130]] *= 8
        made[f"blocks.{layer}.self_attn.k.bias"][[3, 130]] += 6
        made[f"blocks.{layer}.self_attn.v.weight"][[5, 200]] *= 10
    return made


def velocity(weights, fp8=None, patch=None):
    g = dit_graph(SPEC, FLOAT, None, fp8)
    if patch:
        patch(g)
    quantised = coded_matrices(g)
    model = fill(g, QuantisedWeights(weights.__getitem__, SPEC, quantised))
    return open_graph(model)(**inputs_for(SPEC, 3, 8, 8, [900.0]))[0]


@pytest.fixture(scope="module")
def exact(weights):
    return velocity(weights)


def test_smoothing_k_pays_where_k_has_outlier_channels(weights, exact):
    smooth = relative_l2(velocity(weights, BOTH), exact)
    assert smooth < relative_l2(velocity(weights, BOTH, keep_k_mean), exact)


def test_a_scale_for_every_channel_of_v_pays_where_a_few_are_far_larger(weights):
    uneven = {name: value.copy() for name, value in weights.items()}
    for layer in range(SPEC.layers):  # the output projection compensates
        uneven[f"blocks.{layer}.self_attn.v.weight"][[5, 200]] *= 1e4
        uneven[f"blocks.{layer}.self_attn.o.weight"][:, [5, 200]] /= 1e4
    full, attention = velocity(uneven), Quantised(self_attention=True, exceptions=WIDE)
    each = relative_l2(velocity(uneven, attention), full)
    assert 2 * each < relative_l2(velocity(uneven, attention, scale_v_per_tensor), full)


def test_means_over_the_tokens_pay_where_channels_are_large_for_every_token(weights):
    biased = weights | {k: v + 20 for k, v in weights.items() if k.endswith("norm3.bias")}
    full = velocity(biased)
    centred = relative_l2(velocity(biased, Quantised(), subtract_token_means), full)
    assert centred < 0.9 * relative_l2(velocity(biased, Quantised()), full)


def test_a_kind_of_linear_kept_in_high_precision_is_computed_as_in_float32(weights, exact):
    assert relative_l2(velocity(weights, Quantised(exceptions=WIDE)), exact) < 1e-6
    alone = Quantised(exceptions={kind: number for kind, number in WIDE.items() if kind != "ffn.2"})
    assert 0.001 < relative_l2(velocity(weights, alone), exact) < relative_l2(velocity(weights, Quantised()), exact)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_reaches_every_block(patch):
    before, after = (dit_graph(SPEC, FLOAT, None, BOTH) for _ in range(2))
    patch(after)
    readers = [{(node.name, tuple(x.name for x in node.inputs)) for node in g.graph} for g in (before, after)]
    changed = {name.partition("/")[0] for name, _ in readers[0] - readers[1]}
    assert {f"blocks.{index}" for index in range(SPEC.layers)} <= changed
