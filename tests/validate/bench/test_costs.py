"""Costs of pieces of compiled engines: the formulas of the model agree with the graphs."""

from dataclasses import replace

import pytest

from engines.targets import TARGETS
from runtime.request import Request
from validate.bench.costs import Cost, costs_of, peak_of
from validate.bench.work import BenchOptions, work_for
from wan22.bundle import Bundle, open_bundle
from wan22.precision import Precision
from wan22.specs import TEXT_TOKENS


@pytest.fixture(scope="module")
def bundle(flow_of):
    return open_bundle(flow_of("i2v-a14b-tiny").engines, "engines")


@pytest.fixture(scope="module")
def work(bundle):
    return work_for(bundle, BenchOptions(Request(size=(96, 64), frames=9)))


def compiled(bundle, precision=Precision.FP32):
    """The bundle with the manifest of a TensorRT build for an H100."""
    build = replace(bundle.manifest.build, backend="tensorrt", target="h100")
    parts = tuple(
        replace(part, precision=precision) if part.name in bundle.manifest.spec.experts else part
        for part in bundle.manifest.components
    )
    return Bundle(bundle.folder, replace(bundle.manifest, build=build, components=parts))


def test_formulas_and_graphs_agree(flow_of, bundle, work):
    exported = open_bundle(flow_of("i2v-a14b-tiny").bundle, "graphs")
    graphs = Bundle(exported.folder, replace(exported.manifest, build=bundle.manifest.build))
    of_graphs, of_spec = costs_of(work, graphs), costs_of(work, compiled(bundle))
    assert {cost.source for cost in of_graphs.values()} == {"graph"}
    assert {cost.source for cost in of_spec.values()} == {"spec"}
    for piece in ("text_encoder", "vae_encoder", "vae_decoder"):
        assert of_spec[piece].total_flop == of_graphs[piece].total_flop
    for expert in ("high_noise", "low_noise"):
        assert of_graphs[expert].total_flop - of_spec[expert].total_flop == embeddings_and_head(work)


def embeddings_and_head(work):
    """The part of a forward that the formula omits: under 0.1 % in a model of real size."""
    dit, patch = work.spec.dit, 4
    text = TEXT_TOKENS * (dit.text_width + dit.width)
    time = dit.freq_width + dit.width + 6 * dit.width
    return 2 * dit.width * (text + time + work.tokens * patch * (dit.in_channels + dit.out_channels))


def test_a_step_costs_the_full_graph_minus_the_work_done_once_per_prompt(bundle, work):
    whole = replace(bundle.manifest, components=tuple(replace(part, halves=()) for part in bundle.manifest.components))
    of_whole, of_step = (costs_of(work, each)["high_noise"] for each in (Bundle(bundle.folder, whole), bundle))
    dit, rows = work.spec.dit, work.token_ids.shape[1] + 1
    embedded = dit.text_width * dit.width + dit.width**2
    keys_and_values, mixed = 2 * dit.width**2, dit.width**2  # values times the linear behind cross-attention
    once = 2 * rows * (embedded + dit.layers * (keys_and_values + mixed))
    assert of_whole.total_flop - of_step.total_flop == once
    weights = 4 * (embedded + dit.layers * keys_and_values)
    assert weights < of_whole.bytes - of_step.bytes < 1.1 * weights  # biases, norms, and the graph itself


@pytest.mark.parametrize(
    ("precision", "types"),
    [
        (Precision.BF16, {Precision.BF16}),
        (Precision.FP8, {Precision.FP8, Precision.BF16}),
        (Precision.FP8_ATTN, {Precision.FP8_ATTN}),
    ],
)
def test_each_precision_is_measured_against_its_peak(bundle, work, precision, types):
    plans = compiled(bundle, precision)
    cost, peak = costs_of(work, plans)["high_noise"], peak_of(plans)
    assert set(cost.flop) == types
    assert cost.total_flop == costs_of(work, compiled(bundle))["high_noise"].total_flop
    at_peak = sum(flop / (TARGETS["h100"].peak_tflops(p.linears) * 1e12) for p, flop in cost.flop.items())
    assert Cost(cost.flop, 0.0).roofline_s(peak) == pytest.approx(at_peak)
    assert cost.roofline_s(peak) == pytest.approx(max(at_peak, cost.bytes / (TARGETS["h100"].bandwidth_gb_s * 1e9)))
